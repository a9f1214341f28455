"""GGUFSource: every quantization, the rotary order, the config, and hostile files."""

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType

from jaxllm.errors import CheckpointError, UnknownArchitectureError
from jaxllm.weights.gguf import GGUFSource, undo_rope_permutation
from jaxllm.weights.gguf_config import llama3_rope_factors
from jaxllm.weights.gguf_header import GGUFHeader
from tests.weights.conftest import CONFIG, EOS, FFN, HIDDEN, WriteGGUF, llama_cpp_permute

DOWN, GGUF_DOWN = "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"


def q4_k_reference(block: np.ndarray) -> list[float]:
    """256 values of one 144-byte block, number by number, from the format's definition."""
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    s, quants = [int(x) for x in block[4:16]], [int(x) for x in block[16:]]
    values = []
    for group in range(8):
        if group < 4:
            scale, low = s[group] & 63, s[group + 4] & 63
        else:
            scale = (s[group + 4] & 15) | ((s[group - 4] >> 6) << 4)
            low = (s[group + 4] >> 4) | ((s[group] >> 6) << 4)
        for byte in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            quant = byte >> 4 if group % 2 else byte & 15
            values.append(d * scale * quant - dmin * low)
    return values


def q6_k_reference(block: np.ndarray) -> list[float]:
    """256 values of one 210-byte block."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8).astype(int), float(block[208:].view(np.float16)[0])
    values = []
    for i in range(256):
        half, quarter, lane = i // 128, i // 32 % 4, i % 32
        nibble = low[half * 64 + quarter % 2 * 32 + lane] >> (4 * (quarter // 2)) & 15
        bits = high[half * 32 + lane] >> (2 * quarter) & 3
        values.append(d * scales[i // 16] * int((nibble | bits << 4) - 32))
    return values


def test_names_config_and_order(write_gguf: WriteGGUF, weights: dict[str, np.ndarray]) -> None:
    source = GGUFSource(write_gguf())
    assert sorted(source.names()) == sorted(weights)
    for name, weight in weights.items():
        assert source.info(name).shape == weight.shape
        np.testing.assert_array_equal(source.read(name), weight, err_msg=name)
    assert {key: source.config[key] for key in CONFIG} == CONFIG | {"eos_token_id": [EOS]}


def test_only_arch_llama_is_permuted(write_gguf: WriteGGUF, weights: dict[str, np.ndarray]) -> None:
    source = GGUFSource(write_gguf(architecture="qwen2", pre="qwen2", permute=False))
    for name, weight in weights.items():
        np.testing.assert_array_equal(source.read(name), weight)
    assert source.config["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize("shape", [(12, 5), (24, 2, 3), (16,)])
def test_rope_permutation_round_trip(shape: tuple[int, ...]) -> None:
    weight = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(undo_rope_permutation(llama_cpp_permute(weight, 2), 2), weight)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        (QuantType.F16, 2e-3),
        (QuantType.BF16, 2e-2),
        (QuantType.Q8_0, 2e-2),
        (QuantType.Q4_0, 0.4),
        (QuantType.Q4_1, 0.3),
    ],
)
def test_quantized(
    write_gguf: WriteGGUF, weights: dict[str, np.ndarray], kind: QuantType, bound: float
) -> None:
    data = gguf.quantize(weights[DOWN], kind)
    source = GGUFSource(write_gguf(replaced={GGUF_DOWN: (data, kind)}))
    read = source.read(DOWN)
    assert read.dtype.name == source.info(DOWN).dtype
    assert read.shape == source.info(DOWN).shape == (HIDDEN, FFN)
    error = np.abs(read.astype(np.float32) - weights[DOWN]).max()
    assert 0 < error < bound


@pytest.mark.parametrize(
    ("kind", "size", "scales_at", "reference"),
    [(QuantType.Q4_K, 144, (0, 2), q4_k_reference), (QuantType.Q6_K, 210, (208,), q6_k_reference)],
)
def test_k_quants(
    write_gguf: WriteGGUF, kind: QuantType, size: int, scales_at: tuple[int, ...], reference: Any
) -> None:
    data = np.random.default_rng(1).integers(0, 256, (HIDDEN, size), np.uint8)
    for place in scales_at:
        data[:, place : place + 2] = np.array([0.0123], np.float16).view(np.uint8)
    source = GGUFSource(write_gguf(replaced={GGUF_DOWN: (data, kind)}))
    expected = np.array([reference(row) for row in data], np.float32)
    np.testing.assert_allclose(source.read(DOWN), expected, rtol=1e-5, atol=1e-5)


def test_unsupported_quantization(write_gguf: WriteGGUF) -> None:
    data = np.zeros((HIDDEN, 84), np.uint8)
    with pytest.raises(CheckpointError, match="Q2_K"):
        GGUFSource(write_gguf(replaced={GGUF_DOWN: (data, QuantType.Q2_K)}))


def test_dtype_follows_the_matrices(write_gguf: WriteGGUF) -> None:
    data = np.zeros((HIDDEN, FFN), np.float16)
    source = GGUFSource(write_gguf(replaced={GGUF_DOWN: (data, QuantType.F16)}))
    assert source.config["dtype"] == "bfloat16"


def test_llama3_rope_factors_become_scaling(write_gguf: WriteGGUF) -> None:
    factors = llama3_rope_factors(10000.0, 16, 8.0, 1.0, 4.0, 8192).astype(np.float32)
    source = GGUFSource(
        write_gguf(extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    )
    assert source.config["rope_scaling"]["rope_type"] == "llama3"
    assert source.config["rope_scaling"]["factor"] == pytest.approx(8.0)
    assert "rope_freqs.weight" not in source.names()


def test_other_rope_factors_are_refused(write_gguf: WriteGGUF) -> None:
    factors = np.linspace(1, 7, 8, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"Llama 3\.1"):
        GGUFSource(write_gguf(extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)))


def test_linear_rope_scaling(write_gguf: WriteGGUF) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    scaling = GGUFSource(write_gguf(extra=extra)).config["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 2.0}


def test_unknown_architecture(write_gguf: WriteGGUF) -> None:
    with pytest.raises(UnknownArchitectureError, match="mamba"):
        GGUFSource(write_gguf(architecture="mamba"))


def test_mixture_of_experts_is_refused(write_gguf: WriteGGUF) -> None:
    with pytest.raises(CheckpointError, match="experts"):
        GGUFSource(write_gguf(extra=lambda writer: writer.add_expert_count(8)))


def test_cut_anywhere(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path = write_gguf()
    content = path.read_bytes()
    header = GGUFHeader(path).header_bytes
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 64), *range(64, header, 97), header, header + 100, len(content) - 32]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GGUFSource(cut)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def raw(*records: bytes, tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(records)


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GGML" + bytes(100), "magic"),
        (raw(version=1), "version"),
        (raw(version=3 << 24), "version"),
        (raw(tensors=1 << 60), "tensors"),
        (raw(values=1 << 60), "tensors"),
        (raw(values=3), "truncated"),
        (raw(struct.pack("<Q", 1 << 62), values=1), "string"),
        (raw(string("k") + struct.pack("<IQ", 8, 1 << 20), values=1), "truncated"),
        (raw(string("k") + struct.pack("<IIQ", 9, 0, 1 << 62), values=1), "array"),
        (raw(string("k") + struct.pack("<IIQ", 9, 8, 1 << 62), values=1), "array"),
        (raw(string("k") + struct.pack("<IIQ", 9, 10, 1 << 21), values=1), "truncated"),
        (raw(string("k") + struct.pack("<IIQ", 9, 9, 1), values=1), "array of value type"),
        (raw(string("k") + struct.pack("<I", 99), values=1), "unknown value type"),
        (raw((string("k") + struct.pack("<IB", 0, 1)) * 2, values=2), "twice"),
        (raw(string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe", values=1), "UTF-8"),
        (raw(tensor("a", (4,)) * 2, bytes(64), tensors=2), "twice"),
        (raw(tensor("a", (1 << 62, 4)), tensors=1), "dimensions"),
        (raw(tensor("a", (1 << 39, 1 << 39)), tensors=1), "truncated"),
        (raw(tensor("a", ()), tensors=1), "dimensions"),
        (raw(tensor("a", (1,) * 5), tensors=1), "dimensions"),
        (raw(tensor("a", (0,)), tensors=1), "dimensions"),
        (raw(tensor("a", (31,), 8), tensors=1), "dimensions"),
        (raw(tensor("a", (4,), 999), tensors=1), "unknown type"),
        (raw(tensor("a", (4,), 0, 1 << 63), tensors=1), "truncated"),
        (raw(tensor("a", (4,), 0, 4), bytes(64), tensors=1), "aligned"),
        (raw(tensor("a", (9,)), tensor("b", (4,), 0, 32), bytes(128), tensors=2), "overlaps"),
        (
            raw(string("general.alignment") + struct.pack("<II", 4, 0), values=1),
            "alignment",
        ),
    ],
)
def test_hostile_header(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        GGUFHeader(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 1 << 31),
        ("llama.block_count", 10_000),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 7),
        ("llama.attention.head_count_kv", 3),
        ("llama.embedding_length", 65),
        ("llama.rope.dimension_count", 1 << 20),
    ],
)
def test_hostile_metadata(write_gguf: WriteGGUF, key: str, value: int) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_uint32(key, value)

    with pytest.raises(CheckpointError):
        GGUFSource(write_gguf(extra=extra))


def test_missing_metadata_is_named(write_gguf: WriteGGUF) -> None:
    with pytest.raises(CheckpointError, match=r"llama\.feed_forward_length"):
        GGUFSource(
            write_gguf(extra=lambda writer: writer.kv_data[0].pop("llama.feed_forward_length"))
        )


def test_plain_tensors_are_views(write_gguf: WriteGGUF) -> None:
    data = np.ones((HIDDEN, FFN), ml_dtypes.bfloat16).view(np.uint8).reshape(HIDDEN, -1)
    source = GGUFSource(write_gguf(replaced={GGUF_DOWN: (data, QuantType.BF16)}))
    assert not source.read(DOWN).flags.owndata
