"""Where the server listens, with which keys, and for whom."""

import resource
import socket
from pathlib import Path

import pytest

from jaxllm.errors import ConfigError
from server.listen import (
    OTHER_FILES,
    bind,
    check_exposure,
    check_origins,
    guarded,
    is_loopback,
    possible_connections,
    read_api_keys,
    url_of,
)
from server.middleware.auth import tenant_of
from server.settings import ServerSettings


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXLLM_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.9.9.9", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, (), False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid", ""])
def test_other_hosts_do(host: str) -> None:
    with pytest.raises(ConfigError, match="without an API key"):
        check_exposure(host, (), False)
    check_exposure(host, ("key",), False)
    check_exposure(host, (), True)


def test_the_default_is_loopback() -> None:
    assert guarded(ServerSettings()).host == "127.0.0.1"
    with pytest.raises(ConfigError, match="--insecure-no-auth"):
        guarded(ServerSettings(host="0.0.0.0"))
    assert guarded(ServerSettings(host="0.0.0.0", api_keys=("k",))).api_keys == ("k",)


def test_names_of_this_machine_are_the_default_on_loopback_only() -> None:
    names = guarded(ServerSettings()).allowed_hosts
    assert {"localhost", socket.gethostname(), "127.0.0.1"} <= set(names)
    assert "*" not in names
    assert guarded(ServerSettings(allowed_hosts=("x",))).allowed_hosts == ("x",)
    assert guarded(ServerSettings(host="0.0.0.0", api_keys=("k",))).allowed_hosts == ()


def test_keys_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  b \nc\na\n")
    monkeypatch.setenv("JAXLLM_API_KEY", "e,f")
    settings = ServerSettings(api_keys=("a",), api_key_file=str(path))
    assert read_api_keys(settings) == ("a", "b", "c")
    assert read_api_keys(ServerSettings()) == ("e", "f")
    monkeypatch.setenv("JAXLLM_API_KEY", "")
    assert read_api_keys(ServerSettings()) == ()


def test_weights_stand_behind_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a weight=2\nb\nc\t weight=0.5 \n")
    settings = guarded(ServerSettings(api_keys=("d",), api_key_file=str(path)))
    assert settings.api_keys == ("d", "a", "b", "c")
    assert settings.tenant_weights == (f"{tenant_of('a')}=2", f"{tenant_of('c')}=0.5")
    assert guarded(ServerSettings(api_keys=("d",))).tenant_weights == ()


@pytest.mark.parametrize("text", ["", "\n \n", "# only words\n"])
def test_a_file_without_a_key_opens_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(ServerSettings(api_key_file=str(path)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "binary"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_api_keys(ServerSettings(api_key_file=str(path)))


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "a\tb", "\x7f", "a\u00a0b"])
def test_keys_that_no_header_could_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="no header could carry"):
        read_api_keys(ServerSettings(api_keys=("good", key)))


def test_keys_are_in_no_repr() -> None:
    assert "s3cret" not in repr(ServerSettings(api_keys=("s3cret",)))


@pytest.mark.parametrize("origin", ["https://example.org", "http://127.0.0.1:3000", "app://x"])
def test_origins(origin: str) -> None:
    check_origins((origin,), ("key",))


@pytest.mark.parametrize(
    "origin", ["example.org", "https://example.org/", "https://a.org/x", "null", "https://*.a.org"]
)
def test_no_origins(origin: str) -> None:
    with pytest.raises(ConfigError, match="no origin"):
        check_origins((origin,), ())


def test_any_origin_never_with_a_key() -> None:
    check_origins(("*",), ())
    with pytest.raises(ConfigError, match="any web page"):
        guarded(ServerSettings(cors_origins=("*",), api_keys=("key",)))


def test_connections_are_no_more_than_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = [100, 200]

    def set_limits(_: int, both: tuple[int, int]) -> None:
        limits[:] = both

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    assert possible_connections(50) == 50
    assert limits == [50 + OTHER_FILES, 200]  # raised as far as needed
    assert possible_connections(2048) == 200 - OTHER_FILES
    assert limits == [200, 200]
    assert "ulimit -n" in caplog.text
    limits[:] = [8, 8]
    with pytest.raises(ConfigError, match="ulimit -n"):
        possible_connections(10)


def test_a_port_in_use_is_found_before_the_model_is_loaded() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match="in use"):
            bind("127.0.0.1", port)
