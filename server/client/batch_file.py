"""The two files of a batch, in OpenAI's format: requests in, one line of result for each out.

Knows no endpoint. A result is on disk as soon as it is known, in a line of its own.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from uuid import uuid4

from pydantic import Field, ValidationError

from jaxllm.errors import ConfigError, InvalidRequestError
from server.openai.fields import RequestObject
from server.openai.json_text import parse_json
from server.openai.validation import to_invalid_request

MAX_ID_CHARS = 512
_BEGIN = b'{"id":"batch_req_'  # of every line that we write


class BatchLine(RequestObject):
    """One request of the input."""

    custom_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of the input that is no request."""

    number: int  # from 1
    custom_id: str | None
    error: InvalidRequestError


class InputFile:
    """Reads the requests, one line at a time, as often as one likes."""

    def __init__(self, path: Path):
        """Raises ConfigError when it cannot be read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.num_lines = sum(1 for line in file if line.strip())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error

    def __iter__(self) -> Iterator[BatchLine | BadLine]:
        seen: set[str] = set()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._item(number, line, seen)

    def _item(self, number: int, line: bytes, seen: set[str]) -> BatchLine | BadLine:
        custom_id: str | None = None
        try:
            value = parse_json(line)
            custom_id = _custom_id(value)
            parsed = BatchLine.model_validate(value)
            if parsed.body.get("stream"):
                raise InvalidRequestError("An answer in a batch cannot be streamed.")
        except ValidationError as error:
            bad = to_invalid_request(error)
        except InvalidRequestError as error:
            bad = error
        else:
            if parsed.custom_id not in seen:
                seen.add(parsed.custom_id)
                return parsed
            custom_id, bad = None, InvalidRequestError("Its custom_id is an earlier line's too.")
        if custom_id in seen:
            custom_id = None
        elif custom_id is not None:
            seen.add(custom_id)
        return BadLine(number, custom_id, bad)


def _custom_id(value: Any) -> str | None:
    """Of a line that may be wrong otherwise."""
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) and 0 < len(name) <= MAX_ID_CHARS else None


class OutputFile:
    """Appends results. ``done``: custom_ids, and ``bad_lines``: line numbers without one, whose
    result is there already; ``num_failed``: how many of all results are failures.
    """

    def __init__(self, path: Path):
        """Opens or creates it, and repairs a last line that was cut off.

        Raises:
            ConfigError: it cannot be written, another process writes it, or it is something else
                than the output of a batch.
        """
        self.path = path
        self.done: set[str] = set()
        self.bad_lines: set[int] = set()
        self.num_failed = 0
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add_answer(self, custom_id: str, status: int, request_id: str, body: Any) -> None:
        """The answer to a request, be it the one that was wanted or a refusal."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        self._add({"custom_id": custom_id, "response": response, "error": None})

    def add_bad_line(self, bad: BadLine) -> None:
        error = {
            "code": bad.error.code or "invalid_request",
            "message": f"Line {bad.number}: {bad.error.message}",
            "param": bad.error.param,
            "line": bad.number,
        }
        self._add({"custom_id": bad.custom_id, "response": None, "error": error})

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path} is being written by another run-batch.") from None

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    self._repair(number, line)
                elif line.strip():
                    self._note_earlier(number, line)

    def _repair(self, number: int, line: bytes) -> None:
        """A last line without its end: whole, or begun when the disk or the power went."""
        if not (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
            raise self._foreign(number)
        try:
            self._note(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            os.truncate(self.path, self._file.seek(0, os.SEEK_END) - len(line))
        else:
            self._write(b"\n")

    def _note_earlier(self, number: int, line: bytes) -> None:
        try:
            value = json.loads(line)
            if value["id"].startswith("batch_req_"):
                return self._note(value)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise self._foreign(number)

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"Line {number} of {self.path} is not the output of a batch. Name another file."
        )

    def _add(self, result: dict[str, Any]) -> None:
        line = json.dumps({"id": f"batch_req_{uuid4().hex}", **result}, separators=(",", ":"))
        self._write(line.encode() + b"\n")
        self._note(result)

    def _note(self, result: dict[str, Any]) -> None:
        response = result["response"]
        self.num_failed += response is None or response["status_code"] != 200
        if result["custom_id"] is not None:
            self.done.add(result["custom_id"])
        elif result["error"] is not None:
            self.bad_lines.add(result["error"]["line"])

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}.") from error
