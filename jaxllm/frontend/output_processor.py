"""Hands what the engine says to the requests it is about. Owns the table of running requests."""

import logging

from jaxllm.errors import InvalidRequestError, JaxLLMError, RequestFailedError
from jaxllm.frontend.request_state import RequestState
from jaxllm.messages import EngineCoreOutput, StepOutputs

logger = logging.getLogger(__name__)


class OutputProcessor:
    """Request id -> RequestState. Ids it does not know (aborted, finished) are ignored."""

    def __init__(self) -> None:
        self._requests: dict[str, RequestState] = {}
        self._children: dict[str, tuple[RequestState, int]] = {}

    def add(self, state: RequestState) -> None:
        """Raises InvalidRequestError if a request of that id is running."""
        names = (state.request_id, *state.child_ids)
        if state.request_id in self._requests or any(name in self._children for name in names):
            raise InvalidRequestError(
                f"A request with id {state.request_id!r} is already running.",
                param="request_id",
                code="duplicate_request_id",
            )
        self._requests[state.request_id] = state
        for index, child in enumerate(state.child_ids):
            self._children[child] = (state, index)

    def get(self, request_id: str) -> RequestState | None:
        return self._requests.get(request_id)

    def remove(self, state: RequestState) -> None:
        """Forget a request; late outputs for it are dropped."""
        self._requests.pop(state.request_id, None)
        for child in state.child_ids:
            self._children.pop(child, None)

    def running(self) -> tuple[RequestState, ...]:
        return tuple(self._requests.values())

    def fail_all(self, error: JaxLLMError) -> None:
        """Every running request ends with ``error``."""
        for state in self.running():
            state.fail(error)
            self.remove(state)

    def process(self, step: StepOutputs) -> tuple[str, ...]:
        """Distribute one step. Returns the engine's ids of requests it must abort now.

        These are completions ended by a stop string, and the siblings of a failed one.
        """
        aborts: list[str] = []
        for admission in step.admitted:
            state, index = self._children.get(admission.request_id, (None, 0))
            if state is not None and index == 0:  # its siblings' prompt is the same
                state.num_cached_tokens = admission.num_cached_tokens
        for request_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
            self._deliver(request_id, token_id, aborts)
        for output in step.events:
            self._deliver(output.request_id, output, aborts)
        return tuple(aborts)

    def _deliver(self, request_id: str, news: int | EngineCoreOutput, aborts: list[str]) -> None:
        entry = self._children.get(request_id)
        if entry is None or not entry[0].is_running(entry[1]):
            return
        state, index = entry
        try:
            if isinstance(news, int):
                stopped = state.add_token(index, news)
            else:
                stopped = state.add_output(index, news)
        except Exception:  # one request's text must not end the others
            logger.exception("Output of request %s could not be handled.", state.request_id)
            state.fail(RequestFailedError("The output of the model could not be turned into text."))
            stopped = False
        if stopped:
            aborts.append(request_id)
        if state.error is not None:
            aborts.extend(state.unfinished_ids())
        if state.finished:
            self.remove(state)
