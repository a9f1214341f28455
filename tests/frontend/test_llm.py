"""LLM with a fake engine in this process."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from msgspec import structs

from jaxllm.errors import InvalidRequestError
from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams
from tests.frontend.fake_worker import POISON, REFUSED, build_engine


@pytest.fixture
def llm(tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    wiring: Any = ModuleType("jaxllm.worker.wiring")
    wiring.build_engine = build_engine
    monkeypatch.setitem(sys.modules, "jaxllm.worker.wiring", wiring)
    return LLM("fake", tokenizer=str(tiny_tokenizer_dir))


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_one_or_many_prompts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4)
    assert texts(llm.generate("ab", params, use_tqdm=False)) == ["abab"]
    assert texts(llm.generate(["ab", "x"], params, use_tqdm=False)) == ["abab", "xxxx"]
    ids = llm.get_tokenizer().encode("xy")
    assert texts(llm.generate(ids, params, use_tqdm=False)) == ["xyxy"]
    assert texts(llm.generate([ids, ids, "z"], params, use_tqdm=False)) == ["xyxy", "xyxy", "zzzz"]
    each = [SamplingParams(max_tokens=n) for n in (1, 7)]
    assert texts(llm.generate(["ab", "x"], each, use_tqdm=False)) == ["a", "xxxxxxx"]
    assert texts(llm.generate("abc", SamplingParams(stop="ca"), use_tqdm=False)) == ["ab"]
    assert llm.generate([], params) == []
    (many,) = llm.generate("ab", SamplingParams(n=2, max_tokens=3), use_tqdm=False)
    assert [c.text for c in many.outputs] == ["aba", "aba"] and many.finished
    assert many.prompt == "ab" and len(texts(llm.generate("ab", use_tqdm=False))[0]) == 16


def test_without_parameters_they_are_the_model_s(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    sent: list[SamplingParams] = []
    add = llm.core.add_request
    monkeypatch.setattr(llm.core, "add_request", lambda r: (sent.append(r.sampling_params), add(r)))
    llm.info = structs.replace(llm.info, sampling_defaults={"temperature": 0.6, "top_k": 20})
    llm.generate("ab", use_tqdm=False)
    llm.chat([{"role": "user", "content": "Hi"}], use_tqdm=False)
    llm.generate("ab", SamplingParams(top_p=0.5), use_tqdm=False)
    assert [(p.temperature, p.top_k, p.max_tokens) for p in sent] == [(0.6, 20, 16)] * 2 + [
        (1, 0, 16)
    ]
    llm.info = structs.replace(llm.info, max_new_tokens=99)
    assert llm.get_default_sampling_params().max_tokens is None


def test_chat(llm: LLM) -> None:
    message = {"role": "user", "content": "Hi"}
    params = SamplingParams(max_tokens=7, ignore_eos=True, skip_special_tokens=False)
    (one,) = llm.chat([message], params, use_tqdm=False)
    assert one.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert one.outputs[0].text == "<|im_start|>user\nH"
    assert len(llm.chat([[message], [message]], params, use_tqdm=False)) == 2


def test_failures(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError):
        llm.generate(["fine", [999]])
    with pytest.raises(InvalidRequestError, match="2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])
    bad, good = llm.generate([[POISON], [1]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and bad.error and not good.error
    with pytest.raises(InvalidRequestError, match="does not take"):
        llm.generate([[1], [REFUSED]], use_tqdm=False)
    assert llm.stats().num_running == 0  # the other one was aborted
    llm.shutdown()
    with pytest.raises(InvalidRequestError, match="shut down"):
        llm.generate("x")


def test_interrupt_leaves_an_empty_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    core: Any = llm._core
    steps = iter(range(3))

    def step(meanwhile: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return type(core).step(core, meanwhile)

    monkeypatch.setattr(core, "step", step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("ab", SamplingParams(max_tokens=50), use_tqdm=False)
    assert not core.has_work()


def test_progress_bar(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["ab", "cd"], SamplingParams(max_tokens=4))
    shown = capfd.readouterr().err
    assert "2/2" in shown and "tok/s" in shown
