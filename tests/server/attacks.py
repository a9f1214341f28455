"""Classes of attack that were seen on servers like this one: what is sent, what comes back.

Letters: A, one request that kills or wedges the engine; B, one request that reaches another; C,
exhaustion before the scheduler; D, code, files, network and keys.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"
VOCAB_SIZE = 258
WRONG_IDS = (-1, VOCAB_SIZE, 2**31, 2**63, 10**30)
COUNTS = ("max_tokens", "n", "min_tokens", "top_k", "prompt_logprobs", "logprobs", "seed")
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
           "repetition_penalty", *COUNTS)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Send:
    """``status`` 0: 200 or 400, whichever the values deserve, but nothing else."""

    body: dict[str, Any] | bytes
    status: int = 400
    code: str | None = None
    path: str = COMPLETIONS
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 2  # in which the answer must be there


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Hi", "max_tokens": 4} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]} | fields


def everywhere(status: int, code: str | None, **fields: Any) -> Iterator[Send]:
    yield Send(completion(**fields), status, code)
    yield Send(chat(**fields), status, code, CHAT)


def text_of(name: str, literal: str) -> bytes:
    """A body whose field ``name`` is exactly ``literal``."""
    return json.dumps(completion(**{name: "@"})).replace('"@"', literal).encode()


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    inside = opening * depth + "1" + closing * depth
    return b'{"model": "fake", "prompt": "Hi", "x": ' + inside.encode() + b"}"


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def bad_grammars() -> Iterator[Send]:
    for fields in (
        {"guided_grammar": "foo**"}, {"guided_json": {"type": "nothing"}},
        {"guided_json": "{"}, {"guided_regex": "("}, {"guided_regex": "foo**("},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": {}, "regex": "a"}}, {"guided_json": {"not": {}}},
        {"guided_json": {}, "guided_regex": "a"}, {"guided_json": {"$ref": "#"}},
        {"guided_json": {"$ref": "http://127.0.0.1:9/schema"}},
        {"guided_json": {"items": {"allOf": [{"$ref": "file:///etc/passwd"}]}}},
        {"response_format": schema_format({"format": "nothing", "type": "string"})},
        {"response_format": schema_format({"minimum": 2, "maximum": 1, "type": "integer"})},
    ):  # fmt: skip
        yield from everywhere(400, "invalid_grammar", **fields)
    for fields in ({"guided_grammar": ""}, {"guided_regex": ""}, {"guided_choice": [""]}):
        yield from everywhere(400, "empty_string", **fields)
    yield from everywhere(400, "array_above_max_length", guided_choice=["a"] * 20_000)
    yield from everywhere(
        400, "missing_required_parameter", response_format={"type": "json_schema"}
    )
    for backend in ("a", "b"):  # there is one, whatever it is called
        fields = {"json": {"type": "boolean"}, "backend": backend}
        yield from everywhere(200, None, structured_outputs=fields)
    for kind in ("regex", "", None, 1):
        yield from everywhere(400, "invalid_value", response_format={"type": kind})
    yield from everywhere(400, "invalid_value", guided_regex="a", ignore_eos=True)
    yield from everywhere(400, "invalid_value", guided_regex="a", min_tokens=1)
    yield Send(chat(tool_choice="required"), 400, "invalid_value", CHAT)
    for tool_choice in ("any", 1, {}, {"type": "function", "function": {"name": 1}}):
        yield Send(chat(tool_choice=tool_choice), 400, "unsupported_value", CHAT)
    for parameters in (1, [], {"type": "string"}, {"not": {}}, {"$ref": "http://127.0.0.1/x"}):
        function = {"name": "f", "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        fields = {"tools": tools, "tool_choice": "required"}
        yield Send(chat(**fields), 400, None, CHAT)


def slow_grammars() -> Iterator[Send]:
    for regex in ("(a+)+b", "(a|a)*b" * 200, "(.*.*.*a){50}"):
        yield Send(completion(guided_regex=regex), 200)
    for regex in ("(x{1,5000}){5000}", "((((a{0,99}){0,99}){0,99}){0,99}){9,99}", "(" * 30_000):
        yield Send(completion(guided_regex=regex), code="invalid_grammar")
        pattern = {"type": "string", "pattern": regex}
        yield Send(completion(guided_json=pattern), 0)
    many = [f"{i:010}" for i in range(100_000)]
    yield Send(chat(response_format=schema_format({"enum": many})), path=CHAT)
    yield Send(chat(response_format=schema_format({"enum": many[:10_000]})), 200, path=CHAT)
    killed = {"code": "invalid_grammar", "seconds": 10}  # for its CPU time, here shared with others
    yield Send(completion(guided_grammar="root ::= " + '"a" | ' * 80_000 + '"b"'), **killed)
    yield Send(completion(guided_json={"$ref": "#/$defs/a", "$defs": doubling(64)}), 0)
    yield Send(completion(guided_json=one_in_another(20)), 200)
    yield Send(completion(guided_json={"type": "integer", "multipleOf": 99_999_989}), **killed)


def doubling(depth: int) -> dict[str, Any]:
    """Read naively, these are 2 ** depth schemas."""
    names = [f"a{i}" for i in range(depth)]
    return {"a": {"$ref": "#/$defs/a0"}, names[-1]: {"type": "null"}} | {
        name: {"type": "array", "prefixItems": [{"$ref": f"#/$defs/{after}"}] * 2}
        for name, after in pairwise(names)
    }


def one_in_another(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def deep_grammars() -> Iterator[Send]:
    yield Send(completion(guided_grammar="(" * 30_000), code="invalid_grammar")
    yield Send(completion(guided_regex="(" * 30_000 + "a" + ")" * 30_000), code="invalid_grammar")
    for opening, closing in (("[", "]"), ('{"allOf":[', "]}"), ('{"$defs":{"a":', "}}")):
        deep = opening * 10_000 + closing * 10_000
        body = '{"model": "fake", "prompt": "Hi", "response_format": ' + deep + "}"
        yield Send(body.encode(), code="invalid_json")
        yield Send(completion(guided_json=deep), code="invalid_grammar")


def many_grammars() -> Iterator[Send]:
    for i in range(200):
        yield Send(chat(response_format=schema_format({"const": i}), max_tokens=2), 200, path=CHAT)


def odd_numbers() -> Iterator[Send]:
    for name in NUMBERS:
        for literal in ("NaN", "Infinity", "-Infinity", "9" * 5000):
            yield Send(text_of(name, literal))
        for literal in ("1e999", "-1e999", "9223372036854775808"):
            yield Send(text_of(name, literal))
        yield Send(text_of(name, "-0"), 0)
        yield Send(text_of(name, "-0.0"), 0)


def more_tokens_than_there_can_be() -> Iterator[Send]:
    for many in (129, 10**6, 2**31 - 1, 2**31, 2**63):
        yield Send(completion(min_tokens=many, max_tokens=None))
        yield Send(chat(min_tokens=many), path=CHAT)
        yield Send(chat(min_tokens=many, max_tokens=5, stream=True), path=CHAT)
        body = {"model": "fake", "input": "Hi", "min_tokens": many}
        yield Send(body, path=RESPONSES)


def wrong_ids() -> Iterator[Send]:
    for wrong in WRONG_IDS:
        yield from everywhere(400, None, allowed_token_ids=[1, wrong])
        yield from everywhere(400, None, logit_bias={str(wrong): 1})
        yield from everywhere(400, None, stop_token_ids=[wrong])
        for prompt in ([1, wrong], [[1], [wrong]]):
            yield Send(completion(prompt=prompt))
        tokens = {"model": "fake", "tokens": [wrong]}
        yield Send(tokens, path="/detokenize")
    yield Send(completion(prompt=[VOCAB_SIZE - 1], allowed_token_ids=[VOCAB_SIZE - 1]), 200)
    yield Send(completion(bad_words=["Hi", "\U0001f600", " ", "é"]), 200)


EDGES: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1e-9, 1, 100),
    "top_p": (1e-9, 0.5, 1),
    "top_k": (-1, 0, 1, 2**31 - 1),
    "min_p": (0, 0.5, 1),
    "seed": (None, 0, -(2**63), 2**63 - 1),
    "presence_penalty": (-2, 0, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-9, 1, 100),
    "logit_bias": (None, {"65": -100}, {"65": 100, "66": 100}),
    "allowed_token_ids": (None, [65], list(range(256))),
    "bad_words": (None, ["A"]),
    "stop": (None, "A", ["A", "B"]),
    "stop_token_ids": (None, [65], [257]),
    "ignore_eos": (False, True),
    "min_tokens": (0, 4, 5),
    "max_tokens": (0, 1, 4, None),
    "n": (1, 3),
    "best_of": (None, 1, 3),
    "logprobs": (None, 0, 20),
    "prompt_logprobs": (None, 0, 20),
    "echo": (False, True),
    "stream": (False, True),
    "include_stop_str_in_output": (False, True),
    "skip_special_tokens": (False, True),
    "prompt": ("Hi", ["Hi", "Ho"], [65], [[65], [66, 67]]),
}


def all_pairs() -> Iterator[Send]:
    """A covering array: every two values of every two fields meet in some request."""
    names = list(EDGES)
    left = {
        (a, i, b, j)
        for x, a in enumerate(names)
        for b in names[x + 1 :]
        for i in range(len(EDGES[a]))
        for j in range(len(EDGES[b]))
    }
    while left:
        a, i, b, j = min(left)
        chosen = {a: i, b: j}
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    range(len(EDGES[name])),
                    key=lambda k, n=name: len(left & set(pairs(chosen | {n: k}, names, n))),
                )
        left -= {pair for name in names for pair in pairs(chosen, names, name)}
        yield Send(completion(**{name: EDGES[name][k] for name, k in chosen.items()}), 0)


def pairs(chosen: dict[str, int], names: list[str], name: str) -> Iterator[tuple[Any, ...]]:
    """Those of ``name`` with all others that are chosen."""
    here = names.index(name)
    for other, k in chosen.items():
        there = names.index(other)
        if there < here:
            yield (other, k, name, chosen[name])
        elif there > here:
            yield (name, chosen[name], other, k)


def tensors() -> Iterator[Send]:
    for value in ("AAAA", ["AAAA"], {"shape": [1, 10**9]}, "k" * 100_000):
        yield from everywhere(400, "unsupported_parameter", prompt_embeds=value)
    content = [{"type": "image_embeds", "image_embeds": "AAAA"}]
    messages = [{"role": "user", "content": content}]
    yield Send(chat(messages=messages), code="unsupported_content_type", path=CHAT)


def hardly_a_prompt() -> Iterator[Send]:
    for prompt, code in (
        ("", "empty_prompt"), ([], "empty_array"), ([[]], "empty_array"), (None, "invalid_type"),
        ([""], "empty_prompt"), (["Hi", ""], "empty_prompt"), ({}, "invalid_type"),
    ):  # fmt: skip
        yield Send(completion(prompt=prompt), code=code)
    yield Send(chat(messages=[]), code="empty_array", path=CHAT)
    yield Send(completion(prompt=[65], max_tokens=1), 200)
    yield Send(completion(prompt=[257, 257]), 200)
    yield Send(completion(prompt=[65] * 127, max_tokens=1), 200)
    yield Send(completion(prompt=[65] * 127, max_tokens=0, echo=True), 200)
    for length, tokens in ((128, 0), (128, 1), (129, 0), (127, 2), (10**5, 1)):
        sent = completion(prompt=[65] * length, max_tokens=tokens)
        yield Send(sent, code="context_length_exceeded")


def sizes_of_all_kinds() -> Iterator[Send]:
    for name in COUNTS:
        for value in (True, 1.5, "1", [], {}, -(2**64)):
            yield Send(completion(**{name: value}))
    for value in (-1, True, 1.5, "1"):
        yield Send(completion(n_discard=value, n_keep=value), 200)  # of other servers: ignored


def salts() -> Iterator[Send]:
    for salt in ("x" * 2**20, "a\0b", "a/b", "\U0001f9c2", "", 5, ["a"], "a\n", "../a", "a" * 65):
        yield from everywhere(400, None, cache_salt=salt)
    yield from everywhere(200, None, cache_salt="A-z_0")


def other_media() -> Iterator[Send]:
    for part in (
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/1x1.png"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "file", "file": {"file_id": "x"}},
    ):
        messages = [{"role": "user", "content": [part]}]
        yield Send(chat(messages=messages), code="unsupported_content_type", path=CHAT)
    yield Send(chat(audio={"voice": "x"}), code="unsupported_parameter", path=CHAT)
    yield Send(chat(modalities=["image"]), path=CHAT)


def counts() -> Iterator[Send]:
    for n in (10**9, 129, 17, 0, -1, "2", True, 2.5):
        yield from everywhere(400, None, n=n)
    yield from everywhere(400, "integer_above_max_value", best_of=10**9)
    yield from everywhere(400, "invalid_value", use_beam_search=True, n=11)
    yield from everywhere(400, "invalid_value", use_beam_search=True, stream=True)


def prompt_lists() -> Iterator[Send]:
    for prompt in ([""] * 10**6, ["x"] * 65, [[65]] * 65):
        yield Send(completion(prompt=prompt), code="array_above_max_length")
    inputs = {"model": "fake", "input": ["x"] * 2049}
    yield Send(inputs, code="array_above_max_length", path=EMBEDDINGS)
    tokens = {"model": "fake", "prompt": ["x"] * 10**5}
    yield Send(tokens, path=TOKENIZE)


def logprob_counts() -> Iterator[Send]:
    for many in (21, VOCAB_SIZE, 2**31, -1):
        yield Send(completion(logprobs=many))
        yield Send(completion(prompt_logprobs=many))
        yield Send(chat(logprobs=True, top_logprobs=many), path=CHAT)


def compressed() -> Iterator[Send]:
    for coding in ("gzip", "br", "zstd", "deflate", "gzip, gzip", "x"):
        header = ("Content-Encoding", coding)
        yield Send(completion(), 415, "unsupported_media_type", headers=(header,))


def hostile_json() -> Iterator[Send]:
    whole = json.dumps(completion()).encode()
    bodies = [
        b"[" * 100_000, nested(100_000), nested(100_000, '{"a":', "}"), nested(65), b"", b"{",
        b"null", b"[]", b'"x"', b"1", whole + whole, b"\xef\xbb\xbf" + whole,
        json.dumps(completion()).encode("utf-16"), whole.replace(b"Hi", b"\\ud800"),
        whole.replace(b"Hi", b"\xff"), whole.replace(b"Hi", b"\0"), whole.replace(b"Hi", b"\x1f"),
        whole.replace(b'"Hi"', b'"Hi'), whole[:-1], whole.replace(b":", b"="),
    ]  # fmt: skip
    for body in bodies:
        yield Send(body)
    yield Send(b'{"prompt": 5, ' + whole[1:], 200)  # the last of two keys counts, as in most
    yield Send(completion(prompt="a\0b"), 200)


def templates() -> Iterator[Send]:
    yield Send(chat(chat_template="{{ 1 }}"), code="unsupported_parameter", path=CHAT)
    for name in ("chat_template", "tokenize", "messages", "tools", "add_generation_prompt",
                 "eos_token", "raise_exception"):  # fmt: skip
        sent = {"model": "fake", "messages": chat()["messages"], "chat_template_kwargs": {name: 1}}
        for path in (CHAT, TOKENIZE):
            yield Send(sent, code="unsupported_value", path=path)
    deep = {"x": {"y": []}}
    yield Send(chat(chat_template_kwargs=deep), code="unsupported_value", path=CHAT)


def media_types() -> Iterator[Send]:
    for kind in (
        "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/plain", "",
        "application/msgpack", "application/json-patch+json",
    ):  # fmt: skip
        header = ("Content-Type", kind)
        yield Send(completion(), 415, "unsupported_media_type", headers=(header,))
    yield Send(completion(), 200, headers=(("Range", "bytes=" + "0-1," * 1000 + "0-1"),))


def long_texts() -> Iterator[Send]:
    for unit in ("a", " ", "\u0301", "<|im_end|>", "\U0001f600"):
        text = unit * (2**20 // len(unit.encode()))
        yield Send(completion(prompt=text), code="context_length_exceeded")
        yield Send({"model": "fake", "prompt": text}, 0, path=TOKENIZE)


def names() -> Iterator[Send]:
    for name in ("../../etc/passwd", "/etc/passwd", "http://127.0.0.1:9/x", "fake\n", "FAKE", "",
                 "fake/..", "a" * 10**5, "fake\0", "\x1b[31m", "fake\r\nX: y"):  # fmt: skip
        yield Send(completion(model=name), 404, "model_not_found")
    for name in (None, 1, ["fake"], {"a": 1}):
        yield Send(completion(model=name), 400, "invalid_type")
