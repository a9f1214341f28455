"""Assembly and loading: what is refused before any data is read, and what arrives on the device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.errors import CheckpointError
from jaxllm.models.deepseek import DeepseekV3ForCausalLM
from jaxllm.weights.assembly import Assembly
from jaxllm.weights.loader import dummy_params, load_params
from jaxllm.weights.mapping import WeightRule
from jaxllm.weights.sources import TensorInfo
from tests.fakes.tiny_engine import TINY

RULES = [
    WeightRule("qkv", ("q", "k")),
    WeightRule("left", ("both",), split=(0, 2)),
    WeightRule("right", ("both",), split=(1, 2)),
    WeightRule("side", ("s1", "s2"), axis=1),
    WeightRule("norm.weight", ("n",)),
]
SHAPES = {"qkv": (6, 3), "left": (2, 3), "right": (2, 3), "side": (2, 5), "norm.weight": (3,)}


class FakeSource:
    """Tensors in memory; counts what is read."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = tensors
        self.config: dict[str, Any] = {}
        self.reads: list[str] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].shape, self.tensors[name].dtype.name)

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self.tensors[name]


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    shapes = {"q": (4, 3), "k": (2, 3), "both": (4, 3), "s1": (2, 2), "s2": (2, 3), "n": (3,)}
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def spec(dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("saved", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_concatenates_splits_and_casts(
    tensors: dict[str, np.ndarray], saved: Any, dtype: Any
) -> None:
    tensors = {name: tensor.astype(saved) for name, tensor in tensors.items()}
    params = load_params(spec(dtype), RULES, FakeSource(tensors))
    expected = {
        "qkv": np.concatenate([tensors["q"], tensors["k"]]),
        "left": tensors["both"][:2],
        "right": tensors["both"][2:],
        "side": np.concatenate([tensors["s1"], tensors["s2"]], axis=1),
        "norm.weight": tensors["n"],
    }
    assert list(params) == list(SHAPES)
    for name, param in params.items():
        assert isinstance(param, jax.Array) and param.dtype == dtype
        np.testing.assert_array_equal(np.asarray(param), expected[name].astype(dtype))


def test_parameters_do_not_alias_the_source(tensors: dict[str, np.ndarray]) -> None:
    params = load_params(spec(), RULES, FakeSource(tensors))
    before = np.array(params["norm.weight"])
    tensors["n"][:] = 7
    np.testing.assert_array_equal(np.asarray(params["norm.weight"]), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("k"), "missing tensor 'k'"),
        (
            lambda t: t.update(extra=np.zeros((1, 9))),
            r"unexpected tensor 'extra' of shape \(1, 9\)",
        ),
        (
            lambda t: t.update(k=np.zeros((3, 3))),
            r"'k' \(3, 3\) cannot make 'qkv' of shape \(6, 3\)",
        ),
        (lambda t: t.update(k=np.zeros((2, 4))), r"'k' \(2, 4\) cannot make 'qkv'"),
        (lambda t: t.update(k=np.zeros(6)), r"'k' \(6,\) cannot make 'qkv'"),
        (lambda t: t.update(both=np.zeros((5, 3))), r"'both' \(5, 3\) cannot make 'left'"),
        (lambda t: t.update(n=np.zeros((1, 3))), r"'n' \(1, 3\) cannot make 'norm.weight'"),
        (lambda t: t.update(n=np.zeros(())), r"'n' \(\) cannot make 'norm.weight'"),
        (lambda t: t.update(k=np.zeros((2, 3), np.int8)), "'k' has dtype int8"),
        (
            lambda t: t.update(k=np.zeros((2, 3), ml_dtypes.float8_e4m3fn)),
            "'k' has dtype float8_e4m3fn",
        ),
    ],
)
def test_refused_before_anything_is_read(
    tensors: dict[str, np.ndarray], change: Any, message: str
) -> None:
    change(tensors)
    source = FakeSource(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_params(spec(), RULES, source)
    assert source.reads == []


def test_ignored_beginnings_and_ends(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.0.rotary_emb.inv_freq"] = np.zeros(2)
    load_params(spec(), RULES, FakeSource(tensors), ignore=("rotary_emb.inv_freq",))
    with pytest.raises(CheckpointError, match="inv_freq"):
        load_params(spec(), RULES, FakeSource(tensors), ignore=("freq.not",))


def test_the_layer_that_predicts_a_second_token_is_left_out(
    tensors: dict[str, np.ndarray],
) -> None:
    ignore, last = DeepseekV3ForCausalLM.ignored(TINY), TINY.num_layers - 1
    tensors[f"model.layers.{last + 1}.eh_proj.weight"] = np.zeros(2)
    load_params(spec(), RULES, FakeSource(tensors), ignore=ignore)
    tensors[f"model.layers.{last}.eh_proj.weight"] = np.zeros(2)
    with pytest.raises(CheckpointError, match=f"layers.{last}"):
        load_params(spec(), RULES, FakeSource(tensors), ignore=ignore)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[1:], "no rule makes parameter 'qkv'"),
        ([*RULES, WeightRule("ghost", ("n",))], "unknown parameter 'ghost'"),
        ([*RULES, WeightRule("qkv", ("n",))], "two rules"),
        ([*RULES[:-1], WeightRule("norm.weight", ("n",), axis=1)], "cannot make"),
        ([*RULES[:-1], WeightRule("norm.weight", ("n", "n"), split=(0, 2))], "cannot make"),
    ],
)
def test_rules_that_do_not_fit(
    tensors: dict[str, np.ndarray], rules: Sequence[WeightRule], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Assembly(spec(), rules, FakeSource(tensors))


def test_only_the_first_problems_are_listed(tensors: dict[str, np.ndarray]) -> None:
    for number in range(20):
        tensors[f"extra{number}"] = np.zeros(1)
    with pytest.raises(CheckpointError, match=r"\(and 15 more\)"):
        Assembly(spec(), RULES, FakeSource(tensors))


def test_float16_overflow_is_an_error(tensors: dict[str, np.ndarray]) -> None:
    tensors["n"][1] = 70_000.0
    with pytest.raises(CheckpointError, match="use dtype bfloat16"):
        load_params(spec(jnp.float16), RULES, FakeSource(tensors))


def test_dummy_params() -> None:
    shapes = {"a.weight": (64, 256), "b.weight": (64, 256), "norm.weight": (256,), "bias": (256,)}
    wanted = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}
    params = dummy_params(wanted, seed=1)
    assert {n: (p.shape, p.dtype) for n, p in params.items()} == {
        n: (s, jnp.bfloat16) for n, s in shapes.items()
    }
    assert (np.asarray(params["norm.weight"]) == 1).all()
    values = np.asarray(params["a.weight"], np.float32)
    assert abs(values.mean()) < 1e-3 and values.std() == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(values, np.asarray(params["b.weight"], np.float32))
    again, other = dummy_params(wanted, seed=1), dummy_params(wanted, seed=2)
    np.testing.assert_array_equal(values, np.asarray(again["a.weight"], np.float32))
    assert not np.array_equal(values, np.asarray(other["a.weight"], np.float32))
