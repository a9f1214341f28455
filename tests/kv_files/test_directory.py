import os
import stat
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kv_files.block_file import BlockFormat, DamagedBlockError, block_name, file_name
from jaxllm.kv_files.directory import BlockDirectory, DirectoryInUseError

KEY = b"k" * 32
FORMAT = BlockFormat(KEY, "model", (2, 3), np.dtype(np.float32))
BLOCK = np.arange(6, dtype=np.float32).reshape(2, 3)
SIZE = FORMAT.num_bytes
ONE, TWO, THREE = (bytes([n]) * 16 for n in range(3))


def packed(name: bytes, content: np.ndarray = BLOCK, form: BlockFormat = FORMAT) -> bytes:
    return b"".join(form.pack(name, content))


def test_a_block_is_what_it_was() -> None:
    assert np.array_equal(FORMAT.unpack(ONE, packed(ONE)), BLOCK)
    assert len(packed(ONE)) == SIZE
    bfloat16 = np.dtype(jnp.bfloat16)
    form = BlockFormat(KEY, "model", (2, 3), bfloat16)
    again = form.unpack(ONE, packed(ONE, BLOCK.astype(bfloat16), form))
    assert again.dtype == bfloat16 and np.array_equal(again, BLOCK)


def test_any_bit_that_is_wrong_is_noticed() -> None:
    data = packed(ONE)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(DamagedBlockError):
            FORMAT.unpack(ONE, bytes(damaged))


@pytest.mark.parametrize("length", [0, 5, 60, SIZE - 1])
def test_what_is_cut_off_is_noticed(length: int) -> None:
    with pytest.raises(DamagedBlockError):
        FORMAT.unpack(ONE, packed(ONE)[:length])


@pytest.mark.parametrize(
    "form",
    [
        BlockFormat(b"other" * 4, "model", (2, 3), np.dtype(np.float32)),
        BlockFormat(KEY, "other", (2, 3), np.dtype(np.float32)),
        BlockFormat(KEY, "model", (3, 2), np.dtype(np.float32)),
        BlockFormat(KEY, "model", (2, 3), np.dtype(np.int32)),
    ],
)
def test_what_is_another_model_s_is_noticed(form: BlockFormat) -> None:
    with pytest.raises(DamagedBlockError):
        form.unpack(ONE, packed(ONE))
    with pytest.raises(DamagedBlockError):
        FORMAT.unpack(TWO, packed(ONE))


def test_nobody_else_may_look(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path / "kv", 2**20)
    directory.write(ONE, [packed(ONE)])
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.path.iterdir()}
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert set(modes) == {"key", "lock", file_name(ONE)} and set(modes.values()) == {0o600}
    directory.close()


def test_a_restart_finds_files_and_key(tmp_path: Path) -> None:
    first = BlockDirectory(tmp_path, 2**20)
    first.write(ONE, [packed(ONE)])
    (tmp_path / f"{TWO.hex()}.tmp").write_bytes(b"half")  # its writer was killed
    (tmp_path / "notes.txt").write_text("somebody's")
    first.close()
    second = BlockDirectory(tmp_path, 2**20)
    assert second.names() == (ONE,) and second.key == first.key
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [file_name(ONE), "key", "lock", "notes.txt"]
    )
    second.close()


def test_one_engine_at_a_time(tmp_path: Path) -> None:
    first = BlockDirectory(tmp_path, 2**20)
    with pytest.raises(DirectoryInUseError):
        BlockDirectory(tmp_path, 2**20)
    first.close()
    BlockDirectory(tmp_path, 2**20).close()


def test_the_least_recently_used_make_way(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path, 2 * SIZE)
    assert directory.write(ONE, [packed(ONE)]) == ()
    assert directory.write(TWO, [packed(TWO)]) == ()
    directory.read(ONE)
    assert directory.write(THREE, [packed(THREE)]) == (TWO,)
    assert set(directory.names()) == {ONE, THREE}
    files = {name for p in tmp_path.iterdir() if (name := block_name(p)) is not None}
    assert files == {ONE, THREE}
    directory.close()
    os.utime(tmp_path / file_name(THREE), (1, 1))  # by the files' times after a restart
    smaller = BlockDirectory(tmp_path, SIZE)
    assert smaller.names() == (ONE,)
    smaller.close()


def test_one_that_cannot_be_opened_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = BlockDirectory(tmp_path, SIZE)
    directory.write(ONE, [packed(ONE)])
    directory.close()

    def kept(path: Path, **_: bool) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kept)
        with pytest.raises(OSError, match="Read-only"):
            BlockDirectory(tmp_path, SIZE - 1)
    BlockDirectory(tmp_path, SIZE).close()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = BlockDirectory(tmp_path, 2**20)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        directory.write(ONE, [packed(ONE)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key", "lock"]
    assert directory.names() == ()
    directory.close()
