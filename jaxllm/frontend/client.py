"""The one interface through which text is generated; AsyncLLM implements it, the server only knows
this.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from jaxllm.frontend.metrics import EngineMetrics
from jaxllm.messages import EngineStats, ModelInfo
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer

# A prompt is text or token ids.
Prompt = str | Sequence[int]
ChatMessage = dict[str, Any]


class EngineClient(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def ready(self) -> bool:
        """True while the engine process is up and accepts requests."""
        ...

    @property
    def unready_because(self) -> str | None:
        """Why requests had better go elsewhere; None while the engine is up and makes progress."""
        ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Yield outputs as they come, as ``sampling_params.output_kind`` says; the last is
        ``finished``.

        ``cache_salt``: a secret of whoever asks; nobody without it finds out, by the time that an
        answer takes, what was asked before.

        Leaving the iterator early (``aclose``, cancellation) aborts the request.

        Raises:
            InvalidRequestError: before anything is queued; ``ContextLengthExceededError`` among
            them. EngineDeadError: the engine died while the request ran, or is being restarted.
            RequestFailedError: this request alone failed.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets a last output with finish_reason "abort". Unknown ids
        are ignored.
        """
        ...

    def stats(self) -> EngineStats | None: ...

    @property
    def metrics(self) -> EngineMetrics:
        """Counts and times of all requests so far."""
        ...
