"""Reads event streams in tests."""

import json
from typing import Any


def events(text: str) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a stream, and whether it ended with [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    assert data.count("[DONE]") == (data[-1] == "[DONE]")
    done = data[-1] == "[DONE]"
    return [json.loads(item) for item in (data[:-1] if done else data)], done
