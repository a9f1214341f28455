"""The error of a broken invariant: a bug in the host code, never a user's fault."""

from jaxllm.errors import JaxLLMError


class InvariantError(JaxLLMError):
    """What can only happen through a bug did happen.

    Raised by explicit checks rather than ``assert``, which ``python -O`` removes.
    """
