"""The page: its routes, its headers, and all of it in a browser."""

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import override

import pytest
from starlette.testclient import TestClient

from jaxllm.errors import EngineDeadError
from jaxllm.messages import EngineStats
from server.app import create_app
from server.openai.schemas import ChatCompletionRequest
from server.settings import ServerSettings
from server.ui.page import page_routes
from tests.server import chromium
from tests.server.fake_client import ANSWER, OTHER_ID, FakeClient
from tests.server.test_tools import THOUGHTS, says
from tests.server.wire import running

FOLDER = Path(__file__).parents[2] / "server" / "ui"
SCRIPTS = sorted(FOLDER.glob("*.js"))
PATHS = sorted(route.path for route in page_routes())
KEY = "sesame"

Serve = Callable[..., TestClient]


def test_it_is_there_only_when_asked_for(serve: Serve) -> None:
    for path in PATHS:
        assert serve().get(path).status_code == 404
        assert serve(ui=True).get(path).status_code == 200
    assert serve(ui=True, api_keys=(KEY,)).get("/ui/nothing.js").status_code == 401


def test_its_files_need_no_key_and_everything_else_does(serve: Serve) -> None:
    http = serve(ui=True, api_keys=(KEY,))
    assert {http.get(path).status_code for path in PATHS} == {200}
    inside = ("/ui/page.py", "/ui/../app.py", "/ui/%2e%2e/app.py", "/ui//main.js", "/ui", "/ui/")
    for path in ("/v1/models", "/metrics", "/load", "/version", "/index.html", *inside):
        assert http.get(path).status_code == 401, path
    assert http.post("/v1/chat/completions", json={}).status_code == 401
    assert http.post("/", json={}).status_code == 405


@pytest.mark.parametrize("path", PATHS)
def test_headers_forbid_everything_from_elsewhere(serve: Serve, path: str) -> None:
    headers = serve(ui=True).get(path).headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    wanted = kinds.get(path.rpartition(".")[2], "text/html")
    assert headers["content-type"].split(";")[0] == wanted


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    for tag, attributes in Elements((FOLDER / "index.html").read_text()).found:
        assert tag != "style"
        assert tag != "script" or attributes.get("src")
        for name, value in attributes.items():
            assert name != "style" and not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value and f"/{value}" in PATHS, value
    for path in FOLDER.iterdir():
        if path.suffix in (".js", ".css", ".html"):
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|//cdn", text), path.name
    for path in SCRIPTS:
        sinks = (
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|localStorage"
        )
        assert not re.search(sinks, path.read_text()), path.name


def test_bounds_of_the_knobs_are_those_of_the_schema() -> None:
    fields = ChatCompletionRequest.model_json_schema()["properties"]
    knobs = [a for _, a in Elements((FOLDER / "index.html").read_text()).found if a.get("name")]
    numbers = [knob for knob in knobs if knob.get("type") == "number"]
    assert len(numbers) == 9
    for knob in numbers:
        schema = fields[knob["name"]]["anyOf"][0]
        for side, bound in (("min", "minimum"), ("max", "maximum")):
            given, allowed = knob.get(side), schema.get(bound)
            if given is not None and allowed is not None:
                assert float(given) == allowed, knob
        if schema["type"] == "number":
            assert float(knob.get("max") or "nan") == schema["maximum"], knob


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    program = chromium.find()
    if program is None:
        pytest.skip("there is no Chromium here")
    with chromium.open_page(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def site(engine: FakeClient) -> Iterator[str]:
    """A server that wants a key."""
    settings = ServerSettings(served_model_names=("fake", "other"), ui=True, api_keys=(KEY,))
    with running(create_app(engine, settings)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def fresh(page: chromium.Page, site: str) -> chromium.Page:
    """The page as somebody with the key finds it."""
    page.look(width=1200, height=800)
    page.open(site)
    page.wait_for("document.activeElement.id === 'key'")  # it has noticed that it needs one
    page.type("#key", KEY)
    page.run("document.activeElement.dispatchEvent(new Event('change')), null")
    page.wait_for("document.querySelector('#model').options.length === 2")
    page.console.clear()
    return page


def say(page: chromium.Page, text: str) -> None:
    page.type("#input", text)
    page.press_enter()


def idle(page: chromium.Page) -> None:
    page.wait_for("!document.querySelector('.busy') && document.querySelector('.under button')")


def knob(page: chromium.Page, name: str, value: str) -> None:
    page.run(f"document.querySelector('[name={name}]').value = ''")
    page.type(f"[name={name}]", value)


TEXT = "document.querySelector('.assistant:last-child .text').textContent"


def test_a_conversation(fresh: chromium.Page, engine: FakeClient) -> None:
    knobs = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "min_p": "0.1", "seed": "3",
             "max_tokens": "99", "presence_penalty": "-1", "frequency_penalty": "1",
             "repetition_penalty": "1.2"}  # fmt: skip
    for name, value in knobs.items():
        knob(fresh, name, value)
    fresh.type("[name=system]", "Be brief.")
    say(fresh, "Hi")
    idle(fresh)
    assert fresh.run(TEXT) == ANSWER
    params = engine.params[0]
    assert {name: str(getattr(params, name)).removesuffix(".0") for name in knobs} == knobs
    assert "Be brief." in str(engine.prompts[0])
    figures = fresh.run("document.querySelector('.under').textContent")
    assert re.search(r"[\d.]+ tokens/s\d+ ms to the first\d+ tokens", figures), figures
    say(fresh, "And now?")
    fresh.wait_for("document.querySelectorAll('.under button').length === 4")
    assert ANSWER in str(engine.prompts[1])  # what was said is sent along
    assert not fresh.console


def test_tokens_are_coloured_and_show_their_alternatives(
    fresh: chromium.Page, engine: FakeClient
) -> None:
    say(fresh, "Hi")
    idle(fresh)
    assert fresh.run("document.querySelectorAll('.token').length") >= len(ANSWER) - 1
    assert fresh.run("document.querySelector('.token').dataset.p") == "3"  # exp(-0.5) is 61 %
    colour = "getComputedStyle(document.querySelector('.token')).backgroundColor"
    assert fresh.run(colour) != "rgba(0, 0, 0, 0)"
    fresh.hover(".token")
    fresh.wait_for("!document.querySelector('#alternatives').hidden")
    other = engine.tokenizer.decode([OTHER_ID])
    shown = fresh.run("document.querySelector('#alternatives').innerText").split("\n")
    assert shown == ["H", "60.7 %", other, "22.3 %"]
    fresh.click("[name=colour]")
    assert fresh.run(colour) == "rgba(0, 0, 0, 0)"
    say(fresh, "Once more")
    fresh.wait_for("document.querySelectorAll('.under button').length === 4")
    assert fresh.run("document.querySelectorAll('.assistant:last-child .token').length") == 0
    assert fresh.run(TEXT) == ANSWER


def test_code_stands_in_its_own_lines(
    page: chromium.Page, engine: FakeClient, request: pytest.FixtureRequest
) -> None:
    written = "So:\n```python\nx = 1\n```\nand\n```\ny\n```js\nz\n"
    engine._answer_ids = engine.tokenizer.encode(written, add_special_tokens=False)
    fresh: chromium.Page = request.getfixturevalue("fresh")
    say(fresh, "Hi")
    idle(fresh)
    assert fresh.run(TEXT) == written
    lines = fresh.run("[...document.querySelectorAll('.line')].map((l) => l.className.slice(5))")
    first, last = "fence first", "fence last"
    assert lines == ["", first, "code", last, "", first, "code", first, "code"]


def test_thoughts_are_folded_above_the_answer(page: chromium.Page, engine: FakeClient) -> None:
    says(engine, THOUGHTS)
    settings = ServerSettings(served_model_names=("fake",), ui=True, reasoning_parser="qwen3")
    with running(create_app(engine, settings)) as port:
        page.look(width=1200, height=800)
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for("document.querySelector('#model').options.length === 1")
        say(page, "Hi")
        idle(page)
        assert page.run(TEXT) == "Yes."
        assert page.run("document.querySelector('.thought').textContent") == "Hm, é."
        assert page.run("document.querySelector('.thoughts').open") is False
        assert page.run("document.querySelector('.thought').checkVisibility()") is False
        assert page.run("document.querySelectorAll('.text .token').length") > 0
        say(page, "And now?")
        page.wait_for("document.querySelectorAll('.under button').length === 4")
    assert "Hm, é." not in str(engine.prompts[1])


def test_the_stop_button_aborts(fresh: chromium.Page, engine: FakeClient) -> None:
    engine.step_seconds = 0.05
    knob(fresh, "max_tokens", "200")
    say(fresh, "Hi")
    fresh.wait_for("document.querySelectorAll('.token').length > 2")
    fresh.click("#send")
    idle(fresh)
    fresh.wait_for("document.querySelector('.under').textContent.includes('stopped')")
    assert ANSWER.startswith(fresh.run(TEXT))
    assert engine.aborted == engine.request_ids


def test_what_a_model_writes_is_only_text(
    page: chromium.Page, engine: FakeClient, request: pytest.FixtureRequest
) -> None:
    evil = "<img src=x onerror=alert(1)><script>document.title='mine'</script>"
    engine._answer_ids = engine.tokenizer.encode(evil, add_special_tokens=False)
    fresh: chromium.Page = request.getfixturevalue("fresh")
    say(fresh, evil)
    idle(fresh)
    assert fresh.run(TEXT) == evil
    assert fresh.run("document.querySelectorAll('#conversation :is(img, script)').length") == 0
    assert fresh.run("document.title") == "jaxllm"
    trap = "new Promise(() => { document.body.innerHTML = '<b>x</b>' }).catch((e) => e.name)"
    assert fresh.run(trap) == "TypeError"  # the browser itself refuses


def test_the_key_stays_in_the_session(fresh: chromium.Page) -> None:
    say(fresh, "Hi")
    idle(fresh)
    assert fresh.run("localStorage.length") == 0
    assert fresh.run("document.cookie") == ""
    assert fresh.run("sessionStorage.getItem('jaxllm-key')") == KEY
    assert KEY not in fresh.run("location.href")
    assert "sesame" not in fresh.run("document.documentElement.outerHTML")
    fresh.run("(() => { const k = document.querySelector('#key'); k.value = '';"
              "k.dispatchEvent(new Event('input', { bubbles: true })) })()")  # fmt: skip
    assert fresh.run("sessionStorage.getItem('jaxllm-key')") is None


def test_errors_are_shown(fresh: chromium.Page, engine: FakeClient) -> None:
    engine.fail_with, engine.fail_at = EngineDeadError("The engine has gone."), 3
    say(fresh, "Hi")
    fresh.wait_for("document.querySelector('.failure')")
    assert fresh.run("document.querySelector('.failure').textContent") == "The engine has gone."
    assert fresh.run(TEXT) == ANSWER[:3]
    engine.fail_with = None
    fresh.click(".under button:nth-of-type(2)")  # again
    fresh.wait_for(f"document.querySelector('.under') && {TEXT} === {json.dumps(ANSWER)}")


def test_gauges_and_themes(fresh: chromium.Page, engine: FakeClient) -> None:
    engine.engine_stats = EngineStats(5, 2, 0.5, 0, 1)
    fresh.wait_for("document.querySelector('#running').textContent === '5'")
    assert fresh.run("document.querySelector('#waiting').textContent") == "2"
    assert fresh.run("document.querySelector('#kv').textContent") == "50 %"
    back = "getComputedStyle(document.body).backgroundColor"
    light = fresh.run(back)
    fresh.look(width=1200, height=800, scheme="dark")
    dark = fresh.run(back)
    assert dark != light
    fresh.click("#theme")
    assert fresh.run(back) == light


def test_a_phone_shows_everything_in_its_width(fresh: chromium.Page) -> None:
    fresh.look(width=360, height=700, mobile=True)
    say(fresh, "x" * 200)
    idle(fresh)
    assert fresh.run("document.documentElement.scrollWidth") <= 360
    visible = "getComputedStyle(document.querySelector('aside')).display !== 'none'"
    assert not fresh.run(visible)
    fresh.click("#panel")
    assert fresh.run(visible)
