"""Where the operator bounds the places that models come from."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from jaxllm.errors import ConfigError, ModelUnavailableError
from jaxllm.weights import default_model
from jaxllm.weights.model_sources import check_source
from jaxllm.weights.resolve import resolve_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("models/a", "models-of-others/a", "owner/name", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("anything", ()),
        ("models/a", ("./models",)),
        ("models/../models/a", ("./models/a",)),
        ("~/models/a", ("~/models",)),
        ("models/a", (".",)),
        ("models/link", ("./models", "./elsewhere")),
        ("meta-llama/Llama-3.1-8B", ("meta-llama",)),
        ("meta-llama/Llama-3.1-8B", ("other", "meta-llama/Llama-3.1-8B")),
        (default_model.NAME, (default_model.NAME,)),
    ],
)
def test_allowed(name: str, allowed: tuple[str, ...]) -> None:
    check_source(name, allowed)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("models-of-others/a", ("./models",)),
        ("models/../elsewhere", ("./models",)),
        ("models/link", ("./models",)),  # it leads elsewhere
        ("owner/name", ("owner",)),  # on this machine, not on the Hub
        ("meta-llama-evil/x", ("meta-llama",)),
        ("meta-llama/x/y", ("meta-llama/x",)),
        ("meta-llama", ("meta-llama",)),
        ("META-LLAMA/x", ("meta-llama",)),
        ("/models/a", ("meta-llama",)),
        (default_model.NAME, ("meta-llama",)),
        (default_model.HUB_NAME, (default_model.NAME,)),
    ],
)
def test_not_allowed(name: str, allowed: tuple[str, ...]) -> None:
    with pytest.raises(ModelUnavailableError, match="--allowed-model-sources"):
        check_source(name, allowed)


def test_a_directory_does_not_pass_for_the_default_model(home: Path) -> None:
    (home / default_model.NAME).mkdir()
    with pytest.raises(ModelUnavailableError):
        check_source(default_model.NAME, (".",))


@pytest.mark.parametrize("entry", ["", "a/b/c", "https://huggingface.co/x"])
def test_entries_that_name_no_place(entry: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory"):
        check_source("x", (entry,))


def test_nothing_is_fetched_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("it reached out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.setattr(default_model, "default_model_dir", never)
    for name in ("meta-llama/x", default_model.NAME, default_model.HUB_NAME, "/none", "nothing"):
        with pytest.raises(ModelUnavailableError):
            resolve_model(name, allowed_sources=("mistralai", "./models"))


def test_the_hub_is_not_replaced_by_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's repository is also in a package; that is another place."""

    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    owner = default_model.HUB_NAME.partition("/")[0]
    with pytest.raises(ModelUnavailableError, match="cannot be downloaded"):
        resolve_model(default_model.HUB_NAME, allowed_sources=(owner,))
