"""The Pallas backend uses the configs its device was tuned to; a file that does not fit is said."""

from dataclasses import replace

import pytest

from jaxllm.attention.backend import AttentionSpec, AttentionTarget
from jaxllm.attention.backends.pallas import BACKEND, PallasBackend
from jaxllm.attention.select import select_backend
from jaxllm.errors import ConfigError
from pallas_kernels.tuning import table
from pallas_kernels.tuning.table import TunedConfig, TuningTable

SPEC = AttentionSpec(32, 8, 128, 0.1)
TARGET = AttentionTarget("gpu", "9.0", 64, "bfloat16", device_kind="NVIDIA X1")


def _tune(monkeypatch: pytest.MonkeyPatch, **fields: int | bool) -> None:
    default = BACKEND.decode_config
    replaces = {name: getattr(default, name, 1) for name in fields}
    entries = (TunedConfig("decode", replaces, dict(fields), {}, None, {}),)
    found = {"NVIDIA X1": TuningTable("NVIDIA X1", entries)}
    monkeypatch.setattr(table, "load_table", lambda kind, folder: found.get(kind))


def test_the_device_s_configs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _tune(monkeypatch, stages=2, num_ctas=99)
    backend = BACKEND.on(TARGET)
    assert (backend.decode_config.stages, backend.decode_config.num_ctas) == (2, 99)
    assert backend.decode_config.split_tokens == BACKEND.decode_config.split_tokens
    assert BACKEND.decode_config.num_ctas != 99


@pytest.mark.parametrize(("page_size", "issuers"), [(16, 4), (32, 1), (64, 1)])
def test_small_pages_of_the_h200_have_a_config_of_their_own(page_size: int, issuers: int) -> None:
    target = replace(TARGET, page_size=page_size, device_kind="NVIDIA H200")
    backend, _ = select_backend([SPEC], target)
    assert isinstance(backend, PallasBackend)
    assert backend._tiling(SPEC, page_size)[0].issuers == issuers


def test_a_file_that_does_not_fit_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    _tune(monkeypatch, warps=2)
    with pytest.raises(ConfigError, match=r"nvidia-x1\.json.*has no warps"):
        select_backend([SPEC], TARGET)
