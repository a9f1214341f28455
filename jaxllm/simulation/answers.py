"""Collects what an engine tells its clients, and checks the manners of the stream."""

from jaxllm.messages import EngineCoreOutput, StepOutputs
from jaxllm.simulation.oracle import Answer
from jaxllm.simulation.violation import Violation, require


class Answers:
    """Request id -> Answer so far. Every request has exactly one end and nothing after it."""

    def __init__(self) -> None:
        self.by_id: dict[str, Answer] = {}

    def expect(self, request_id: str) -> None:
        self.by_id[request_id] = Answer()

    def take(self, outputs: StepOutputs | None) -> list[str]:
        """Ids of the requests that have ended with these."""
        if outputs is None:
            return []
        events = [event.request_id for event in outputs.events]
        told = [*outputs.request_ids, *events]
        require(len(set(told)) == len(told), "stream", "A request is told twice in one step.")
        for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            self._open(request_id).token_ids.append(token_id)
        for event in outputs.events:
            self._take_event(event)
        return [event.request_id for event in outputs.events if event.finish_reason is not None]

    def _take_event(self, event: EngineCoreOutput) -> None:
        answer = self._open(event.request_id)
        answer.token_ids += event.new_token_ids
        answer.logprobs += event.logprobs
        answer.prompt_logprobs += event.prompt_logprobs
        answer.finish_reason = event.finish_reason
        answer.stop_reason = event.stop_reason
        answer.error = event.error

    def _open(self, request_id: str) -> Answer:
        answer = self.by_id.get(request_id)
        if answer is None or answer.finish_reason is not None:
            raise Violation("stream", f"{request_id} is told more after its end.")
        return answer
