"""45 classes of attack: each is sent, answered as it should be, and leaves the server as it was."""

import ast
import concurrent.futures
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import attacks
from tests.server.attacked_server import MODEL, AttackedServer, attacked_server, error_of
from tests.server.attacks import Send
from tests.server.command import ROOT
from tests.server.sse import read_stream
from tests.server.wire import connect, hung_up, read_answer, request

SENDS: dict[str, Callable[[], Iterable[Send]]] = {
    "A1 bad grammar": attacks.bad_grammars,
    "A2 slow grammar": attacks.slow_grammars,
    "A3 deep grammar": attacks.deep_grammars,
    "A4 many grammars": attacks.many_grammars,
    "A5 odd numbers": attacks.odd_numbers,
    "A6 more tokens than there can be": attacks.more_tokens_than_there_can_be,
    "A7 token ids": attacks.wrong_ids,
    "A8 every pair of parameters": attacks.all_pairs,
    "A9 tensors": attacks.tensors,
    "A10 hardly a prompt": attacks.hardly_a_prompt,
    "A13 sizes": attacks.sizes_of_all_kinds,
    "A14 salts": attacks.salts,
    "A15 other media": attacks.other_media,
    "C1 many choices": attacks.counts,
    "C2 many prompts": attacks.prompt_lists,
    "C3 many logprobs": attacks.logprob_counts,
    "C5 compressed bombs": attacks.compressed,
    "C6 hostile JSON": attacks.hostile_json,
    "C7 templates": attacks.templates,
    "C10 ranges and forms": attacks.media_types,
    "C11 long texts": attacks.long_texts,
    "D7 names that are paths": attacks.names,
}
HERE = "server/test_attack_classes.py::"
TESTED: dict[str, tuple[str, ...]] = {  # where a class needs more than a body
    "A11 larger than the cache": (
        "core/test_scheduler.py::test_a_request_the_pool_can_never_hold_is_refused",
        "worker/test_wiring.py::test_a_small_cache_shortens_the_length_nobody_asked_for",
    ),
    "A12 leaving at any moment": (
        "server/test_disconnect.py::test_blocks_are_free_two_steps_after_a_client_left",
        "frontend/test_async_llm.py::test_thousand_cancels_leave_nothing_running",
        "core/test_scheduler.py::test_abort_in_every_state",
    ),
    "B1 stale state of a row": (
        "simulation/test_scenarios.py::test_every_answer_equals_the_request_run_alone",
        "simulation/test_planted_bugs.py::test_every_planted_bug_is_noticed",
        "clients/test_company.py::test_company_changes_nothing",
    ),
    "B2 prefix cache: collisions": ("core/test_prefix_cache.py::test_hashes_need_the_key",),
    "B3 prefix cache: timing": (
        f"{HERE}test_nothing_is_shared_between_salts",
        "core/test_kv_cache_manager.py::test_nothing_is_shared",
    ),
    "B4 ids chosen by clients": (
        f"{HERE}test_ids_of_clients_are_only_echoed",
        "server/test_middleware.py::test_other_request_ids_are_replaced",
    ),
    "B5 orphaned blocks": (f"{HERE}test_blocks_of_several_prompts_come_back",),
    "C4 bodies, headers, chunks": (
        f"{HERE}test_bodies_without_end",
        "server/test_protocol.py::test_too_large",
        "server/test_protocol_time.py::test_heads_that_do_not_end",
        "server/test_protocol_time.py::test_bodies_that_do_not_end",
    ),
    "C8 parsers of model output": (
        f"{HERE}test_nobody_parses_what_a_model_says",
        "parsers/test_hostile.py::test_a_megabyte_of_markers_takes_linear_time",
        "parsers/test_hostile.py::test_brackets_and_quotes_take_linear_time",
    ),
    "C9 labels of metrics": (
        f"{HERE}test_metrics_do_not_grow",
        "server/test_metrics.py::test_nobody_can_invent_labels",
    ),
    "C12 flood of the queue": ("server/test_overload.py::test_ten_times_too_many_at_once",),
    "D1 pickle": (
        "arch/test_source.py::test_nothing_runs_code_found_in_data",
        "arch/test_source.py::test_unsafe_is_seen",
    ),
    "D2 sockets between processes": (
        "server/test_network.py::test_no_request_makes_the_server_reach_out",
        "frontend/test_ipc.py::test_garbage_is_a_frame_error_or_a_valid_message",
        "frontend/test_process_client.py::test_worker_survives_ctrl_c_and_refuses_garbage",
    ),
    "D3 code in model directories": (
        "arch/test_source.py::test_nothing_runs_code_found_in_data",
        "worker/test_wiring.py::test_code_beside_the_weights_is_never_run",
        "tokenizer/test_tokenizer.py::test_needs_no_transformers_and_no_jax",
    ),
    "D4 templates that run code": (
        "tokenizer/test_chat_template.py::test_template_errors_and_escapes",
    ),
    "D5 hostile checkpoints": (
        "weights/test_checkpoint.py::test_hostile_files_under_a_valid_manifest",
        "weights/test_safetensors.py::test_hostile_header",
        "weights/test_gguf.py::test_hostile_header",
        "weights/test_manifest.py::test_paths_outside",
    ),
    "D6 requests to elsewhere": (
        "server/test_network.py::test_no_request_makes_the_server_reach_out",
    ),
    "D8 ways around the key": (
        "server/test_auth.py::test_every_path_and_method_needs_a_key",
        "server/test_auth.py::test_however_a_path_is_written",
    ),
    "D9 timing of the key": (
        "server/test_auth.py::test_every_key_is_compared_whichever_is_right",
        "server/test_auth.py::test_comparing_takes_as_long_for_a_near_miss",
    ),
    "D10 text of errors": (
        "server/test_error_text.py::test_unforeseen_errors",
        "server/test_error_text.py::test_refusals_of_every_field",
    ),
    "D11 forged lines of the log": (
        "server/test_access_log.py::test_no_line_can_be_forged",
        "server/test_access_log.py::test_nothing_that_was_said_is_logged",
    ),
    "D12 browsers": (
        "server/test_hosts.py::test_names_of_others",
        "server/test_hosts.py::test_without_cors_no_page_may_read",
        "server/test_listen.py::test_other_hosts_do",
    ),
    "D13 smuggling": (
        f"{HERE}test_nothing_is_smuggled",
        "server/test_protocol.py::test_malformed_requests",
    ),
}
_LEAK = re.compile(r"0x[0-9a-f]{6,}|/site-packages/|Traceback|File \"")


@pytest.fixture(scope="module")
def server(tiny_tokenizer_dir) -> Iterator[AttackedServer]:
    with attacked_server(tiny_tokenizer_dir, max_body_bytes=8 * 2**20) as server:
        yield server


def test_every_class_is_here() -> None:
    wanted = {f"{letter}{i}" for letter, n in zip("ABCD", (15, 5, 12, 13), strict=True)
              for i in range(1, n + 1)}  # fmt: skip
    named = [name.split()[0] for name in (*SENDS, *TESTED)]
    assert len(named) == len(set(named)) == 45
    assert set(named) == wanted


def test_every_named_test_is_there() -> None:
    for names in TESTED.values():
        for name in names:
            path, _, function = name.partition("::")
            assert function in functions_of(path), name


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("name", SENDS)
def test_sent(server: AttackedServer, name: str) -> None:
    with server.as_before():
        for send in SENDS[name]():
            check(send, post(server.http, send))


def post(http: httpx.Client, send: Send) -> httpx.Response:
    # ASCII, so that half a surrogate pair can be sent
    body = send.body if isinstance(send.body, bytes) else json.dumps(send.body).encode()
    headers = {"content-type": "application/json"} | dict(send.headers)
    if "Content-Type" in headers:
        del headers["content-type"]
    return http.post(send.path, content=body, headers=headers)


def check(send: Send, answer: httpx.Response) -> None:
    said = f"{send.path} {str(send.body)[:200]}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in ((200, 400) if send.status == 0 else (send.status,)), said
    assert answer.elapsed.total_seconds() < 10, said
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert read_stream(answer.content).done, said
    elif answer.status_code == 200:
        assert answer.json(), said
    else:
        error = error_of(answer)
        assert error["type"] == "invalid_request_error", said
        assert send.code is None or error["code"] == send.code, said
        assert not _LEAK.search(answer.text), said
        assert len(answer.content) < 2000, said


def test_nothing_is_shared_between_salts(server: AttackedServer) -> None:
    """No answer shows that a prompt was there before, except to those of the same salt."""
    body = attacks.completion(prompt="s" * 100, max_tokens=1)
    cached: list[int] = []
    with server.as_before():
        for salt in ("a", "b", "a"):
            answer = server.http.post("/v1/completions", json=body | {"cache_salt": salt})
            cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_an_empty_list_of_changes_is_none(server: AttackedServer) -> None:
    """Its blocks are others' too, and nobody complains."""
    body = attacks.completion(prompt="e" * 100, max_tokens=1)
    with server.as_before():
        server.http.post("/v1/completions", json=body | {"interventions": []})
        answer = server.http.post("/v1/completions", json=body)
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_ids_of_clients_are_only_echoed(server: AttackedServer) -> None:
    body = attacks.completion(max_tokens=8, ignore_eos=True, seed=1)
    ids = ["same"] * 100 + list("0123456789abcdef") + ["x" * 20_000, "é", "a/b", "req_", "a\tb"]

    def ask(request_id: str) -> tuple[str, str]:
        header = [(b"X-Request-Id", request_id.encode())]
        answer = server.http.post("/v1/completions", json=body, headers=header)
        return answer.headers["x-request-id"], answer.json()["choices"][0]["text"]

    with server.as_before(), concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, ids))
        leave_at_once(server, "1", attacks.completion(stream=True, max_tokens=100))
    assert len({text for _, text in answers}) == 1 and answers[0][1]
    for given, (echoed, _) in zip(ids, answers, strict=True):
        plain = re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given)
        assert echoed == given if plain else re.fullmatch(r"req_[0-9a-f]{32}", echoed)


def leave_at_once(server: AttackedServer, request_id: str, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    fields = (f"X-Request-Id: {request_id}", "Content-Type: application/json")
    with connect(server.port) as connection:
        connection.sendall(request("/v1/completions", *fields, method="POST", body=content))
        connection.recv(64)


def test_blocks_of_several_prompts_come_back(server: AttackedServer) -> None:
    body = attacks.completion(prompt=["one", "two", "three"], n=3, max_tokens=60, ignore_eos=True)
    with server.as_before():
        for number in range(20):
            leave_at_once(server, f"several-{number}", body | {"stream": True})
        whole = server.http.post("/v1/completions", json=body)
        assert len(whole.json()["choices"]) == 9


def test_bodies_without_end(tiny_tokenizer_dir: Path) -> None:
    """A gigabyte with and without a length, a million chunks of a byte, 5,000 headers."""
    json_type = "Content-Type: application/json"
    long = request("/v1/completions", json_type, f"Content-Length: {2**30}", method="POST")
    chunked = request("/v1/completions", json_type, "Transfer-Encoding: chunked", method="POST")
    many = [f"X-{i}: y" for i in range(5000)]
    attempts = (
        (413, long, b" " * 2**16),
        (413, chunked, b"10000\r\n" + b" " * 2**16 + b"\r\n"),
        (413, chunked, b"1\r\n \r\n" * 10_000),
        (431, request("/v1/completions", *many), b""),
        (431, request("/v1/completions", "X: " + "y" * 200_000), b""),
    )
    with (
        attacked_server(tiny_tokenizer_dir, max_body_bytes=2**19) as server,
        server.as_before(),
    ):
        for status, head, more in attempts:
            with connect(server.port, timeout=20) as connection:
                send_until_refused(connection, head, more)
                assert read_answer(connection).status == status
                assert hung_up(connection)


def send_until_refused(connection, head: bytes, more: bytes, most: int = 2**26) -> None:
    """At most 64 MiB: whatever does not stop us before that takes too much."""
    connection.setblocking(False)
    sent, left = 0, memoryview(head)
    try:
        while sent < most:
            try:
                connection.recv(1, 2)  # MSG_PEEK: it has answered
                break
            except BlockingIOError:
                pass
            try:
                count = connection.send(left)
            except BlockingIOError:
                continue
            except ConnectionError:
                break
            sent += count
            left = left[count:] or memoryview(more)
            if not left:
                break
    finally:
        connection.settimeout(20)
    assert sent < most, "nobody stopped us"


def test_nobody_parses_what_a_model_says(server: AttackedServer) -> None:
    """Tools are shown to the model; what it answers is text."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    echoed = '<tool_call>{"name": "f"}</tool_call>' + "[" * 80
    with server.as_before():
        body = {"model": MODEL, "prompt": echoed, "max_tokens": 8, "echo": True}
        answer = server.http.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"].startswith(echoed)
        body = attacks.chat(tools=tools, max_tokens=8)
        answer = server.http.post("/v1/chat/completions", json=body).json()
        assert not answer["choices"][0]["message"].get("tool_calls")


def test_metrics_do_not_grow(server: AttackedServer) -> None:
    with server.as_before():
        ask_oddly(server, 0)
        server.http.get("/metrics")
        before = len(server.http.get("/metrics").text.splitlines())
        for number in range(1, 200):
            ask_oddly(server, number)
        assert len(server.http.get("/metrics").text.splitlines()) == before


def ask_oddly(server: AttackedServer, number: int) -> None:
    server.http.request("PROPFIND", f"/path/{number}")
    server.http.get(f"/v1/models/{number}")
    server.http.post("/v1/completions", json=attacks.completion(model=f"model-{number}"))


def test_nothing_is_smuggled(server: AttackedServer) -> None:
    """The second request within the body of a doubtful first one is never answered."""
    inner = request("/health/live", host="127.0.0.1")
    chunked = "Transfer-Encoding: chunked"
    doubtful = (
        request("/v1/models", "Content-Length: 5", chunked, method="POST", body=b"0\r\n\r\n"),
        request("/v1/models", "Content-Length: 0", f"Content-Length: {len(inner)}", method="POST"),
        request("/v1/models", "A: b", " c: d"),
        request("/v1/models").replace(b"\r\n", b"\n"),
        request("/v1/models", "Host: y"),
    )
    with server.as_before():
        for first in doubtful:
            with connect(server.port) as connection:
                connection.sendall(first + inner)
                assert read_answer(connection).status == 400
                assert hung_up(connection)
