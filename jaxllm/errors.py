"""Every exception a user can meet, each with its HTTP status, OpenAI error type and exit code.

Errors are raised at the border where the input enters. The message says what was wrong and
what to change; it never holds a traceback, an address or a path the user did not name.
"""


class JaxLLMError(Exception):
    """Base class. ``status`` is the HTTP status, ``exit_code`` what the command line returns,
    ``retry_after_s`` when it is worth asking again (None: not by itself).
    """

    status = 500
    type = "server_error"
    code: str | None = "internal_error"
    exit_code = 1
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(JaxLLMError):
    """A request that can never succeed as it stands. ``param`` names the offending field."""

    status = 400
    type = "invalid_request_error"
    code = None
    exit_code = 2


class ContextLengthExceededError(InvalidRequestError):
    """Prompt plus requested tokens do not fit into ``max_model_len``."""

    code = "context_length_exceeded"


class AuthenticationError(InvalidRequestError):
    status = 401
    code = "invalid_api_key"


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that this server does not serve."""

    status = 404
    code = "model_not_found"


class QueueFullError(JaxLLMError):
    """More requests, or tokens, wait than the server's limits allow."""

    status = 429
    type = "rate_limit_error"
    code = "server_overloaded"
    retry_after_s = 1.0


class EngineDeadError(JaxLLMError):
    """The engine process ended or is being restarted; the request may be sent again."""

    status = 503
    code = "engine_unavailable"
    retry_after_s = 5.0


class RequestFailedError(JaxLLMError):
    """This request alone failed inside the engine (for example: logits that are not finite)."""

    code = "request_failed"


class ConfigError(JaxLLMError):
    """The engine cannot start with what it was asked: wrong flag, unknown model, too little
    memory.
    """

    status = 400
    type = "invalid_request_error"
    code = None
    exit_code = 2


class UnknownArchitectureError(ConfigError):
    """``config.json`` names an architecture that no file in jaxllm/models implements."""


class CheckpointError(ConfigError):
    """A checkpoint is truncated, altered, or its names, shapes or dtypes are not the model's."""


class ModelUnavailableError(ConfigError):
    """The model is neither a local directory nor a file, and could not be downloaded."""


class OutOfMemoryError(ConfigError):
    """The configuration needs more memory than the device has."""

    exit_code = 3


class RecompilationError(JaxLLMError):
    """A step asked for a program that warm-up did not compile. Always a bug in bucket selection."""
