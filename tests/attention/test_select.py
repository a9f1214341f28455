"""The choice of a backend: the first that does not refuse, and the log says why."""

from dataclasses import replace

import pytest

from jaxllm.attention import select
from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.backends import xla
from jaxllm.attention.kv_cache import most_padded
from jaxllm.attention.select import BACKENDS, cache_head_dims, select_backend
from jaxllm.config.model import LatentConfig
from jaxllm.errors import ConfigError
from jaxllm.registry import Registry
from pallas_kernels.attention.variants.alibi import ALIBI
from tests.fakes.tiny_engine import TINY

WIDE, WINDOWED = AttentionSpec(8, 2, 128, 0.1), AttentionSpec(8, 2, 128, 0.1, window=16)
GPU, CPU = (AttentionTarget(platform, "", 64, "bfloat16") for platform in ("gpu", "cpu"))


class Picky:
    """Refuses windows, a variant, and every platform but one."""

    name = "picky"

    def on(self, target: AttentionTarget) -> "Picky":
        return self

    def refuses(self, spec: AttentionSpec, target: AttentionTarget) -> str | None:
        if target.platform != "gpu":
            return f"no {target.platform}"
        if spec.variant is ALIBI:
            return "no slopes"
        return None if spec.window is None else "no windows"


PICKY = Picky()


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"picky": f"{__name__}:PICKY", "xla": "jaxllm.attention.backends.xla:BACKEND"}
    registry = Registry("attention backend", table)
    monkeypatch.setattr(registry, "load", {"picky": PICKY, "xla": xla.BACKEND}.__getitem__)
    monkeypatch.setattr(select, "BACKENDS", registry)


def test_every_listed_backend_can_be_loaded_and_the_last_takes_everything() -> None:
    loaded = [BACKENDS.load(name) for name in BACKENDS.names()]
    assert [backend.name for backend in loaded] == list(BACKENDS.names())
    for target in (GPU, CPU):
        assert loaded[-1].refuses(WINDOWED, target) is None


@pytest.mark.usefixtures("two_backends")
def test_the_first_that_does_not_refuse() -> None:
    assert select_backend([WIDE], GPU) == (PICKY, "picky on gpu")


@pytest.mark.usefixtures("two_backends")
def test_one_refused_layer_is_enough_and_the_reason_is_told_once() -> None:
    backend, reason = select_backend([WIDE, WINDOWED, WINDOWED], GPU)
    assert isinstance(backend, xla.XLABackend)
    assert reason == "xla on gpu; picky refused: no windows"
    assert select_backend([WIDE], CPU)[1] == "xla on cpu; picky refused: no cpu"


@pytest.mark.usefixtures("two_backends")
def test_a_variant_that_costs_the_first_backend_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sloped = replace(WIDE, variant=ALIBI)
    select_backend([WIDE, sloped, replace(sloped, scale=0.2)], GPU)
    (warning,) = caplog.messages
    assert "alibi is not served by picky" in warning and "no slopes" in warning
    caplog.clear()
    select_backend([WIDE, WINDOWED, replace(WINDOWED, variant=ALIBI)], GPU)
    select_backend([sloped], CPU)
    assert not caplog.messages, "they are refused without it, too"


def test_no_backend_left_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("attention backend", {"picky": "nowhere:PICKY"})
    monkeypatch.setattr(registry, "load", lambda name: PICKY)
    monkeypatch.setattr(select, "BACKENDS", registry)
    with pytest.raises(ConfigError, match="picky refused: no cpu"):
        select_backend([WIDE], CPU)


def test_a_listed_backend_that_does_not_import_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry("attention backend", {"gone": "jaxllm.attention.backends.gone:BACKEND"})
    monkeypatch.setattr(select, "BACKENDS", registry)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        select_backend([WIDE], CPU)


def test_heads_are_padded_layer_by_layer_and_pages_of_keys_alone_never() -> None:
    layers = ("rotary", "differential", "latent")
    latent = LatentConfig(q_rank=None, kv_rank=64, nope_dim=16, rope_dim=16, value_dim=16)
    facts = {"num_layers": 3, "attention_layers": layers, "latent": latent, "sliding_windows": ()}
    model = replace(TINY, head_dim=80, **facts)
    pallas, plain = BACKENDS.load("pallas"), BACKENDS.load("xla")
    assert cache_head_dims(model, pallas) == cache_head_dims(model) == (128, 256, 80)
    assert cache_head_dims(model, plain) == ()
    assert most_padded(model, (128, 256, 80)) in {(80, 128), (160, 256)}
    assert most_padded(replace(TINY, **facts), ())[1] == TINY.head_dim
