"""The threads: what is asked for arrives or is said to be lost; trouble ends the store, once."""

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.core.disk_tier import DiskNews
from jaxllm.kv_files.block_file import file_name
from jaxllm.kv_files.directory import BlockDirectory
from jaxllm.kv_files.store import MAX_SECONDS, MAX_UNWRITTEN_BYTES, BlockStore

BLOCK = np.arange(6, dtype=np.float32).reshape(2, 3)
ONE, TWO = (bytes([n]) * 16 for n in range(2))


def started(path: Path, **options: Any) -> BlockStore:
    store = BlockStore(BlockDirectory(path, 2**20), "model", **options)
    store.start(BLOCK.shape, BLOCK.dtype)
    return store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    store = started(tmp_path)
    yield store
    store.close()


def news_of(store: BlockStore) -> DiskNews:
    """All that is heard until what was begun is done."""
    store.wait(10.0)
    return store.take() or DiskNews()


def test_a_block_comes_back(store: BlockStore) -> None:
    store.write(ONE, BLOCK)
    assert news_of(store) == DiskNews(stored=(ONE,))
    store.read([(ONE, 7)])
    assert news_of(store) == DiskNews(read=(ONE,))
    ((slot, content),) = store.contents()
    assert slot == 7 and np.array_equal(content, BLOCK)
    assert store.take() is None and not store.contents()


def test_a_later_engine_hears_of_it_at_once(tmp_path: Path) -> None:
    first = started(tmp_path)
    first.write(ONE, BLOCK)
    first.close()  # which writes what is waiting
    second = started(tmp_path)
    assert second.take() == DiskNews(stored=(ONE,))
    second.close()


def test_the_last_word_on_a_block_counts(tmp_path: Path) -> None:
    """With room for one block, one that made way and came again is there."""
    with_one = started(tmp_path)
    with_one.write(ONE, BLOCK)
    with_one.close()
    size = (tmp_path / file_name(ONE)).stat().st_size
    store = BlockStore(BlockDirectory(tmp_path, size), "model")
    store.start(BLOCK.shape, BLOCK.dtype)
    for name in (TWO, ONE, TWO, ONE):
        store.write(name, BLOCK)
    store._unwritten.put(None)
    store._threads[-1].join(10.0)
    assert store.take() == DiskNews(stored=(ONE,), gone=(TWO,))
    store.close()


@pytest.mark.parametrize("damage", ["vanished", "cut", "flipped"])
def test_what_is_damaged_is_a_miss_and_deleted(
    store: BlockStore, tmp_path: Path, damage: str
) -> None:
    store.write(ONE, BLOCK)
    news_of(store)
    path = tmp_path / file_name(ONE)
    data = bytearray(path.read_bytes())
    if damage == "vanished":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    store.read([(ONE, 0)])
    assert news_of(store) == DiskNews(failed=(ONE,))
    assert not path.exists() and not store.contents()


def test_what_was_asked_before_a_reset_does_not_come(store: BlockStore) -> None:
    store.write(ONE, BLOCK)
    news_of(store)
    store.read([(ONE, 0)])
    store.wait(10.0)
    store.forget()
    assert store.take() is None and not store.contents()


def test_the_directory_s_end_is_the_store_s(
    store: BlockStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    shutil.rmtree(tmp_path)
    store.write(ONE, BLOCK)
    store.write(TWO, BLOCK)
    assert news_of(store) == DiskNews(off=True)
    store.write(ONE, BLOCK)
    store.read([(ONE, 0)])
    assert store.take() is None
    assert len(caplog.records) == 1


def test_a_disk_that_hangs_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    store = started(tmp_path, clock=lambda: now[0])

    def hang(name: bytes) -> bytes:
        time.sleep(0.3)
        raise FileNotFoundError

    monkeypatch.setattr(store._directory, "read", hang)
    store.read([(ONE, 0)])
    assert store.take() is None
    now[0] = MAX_SECONDS + 1
    assert store.take() == DiskNews(off=True)
    store.close()


def test_what_comes_after_the_end_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot may be another block's by then."""
    now = [0.0]
    store = started(tmp_path, clock=lambda: now[0])
    store.write(ONE, BLOCK)
    news_of(store)
    read = store._directory.read
    monkeypatch.setattr(store._directory, "read", lambda name: (time.sleep(0.3), read(name))[1])
    store.read([(ONE, 0)])
    now[0] = MAX_SECONDS + 1
    assert store.take() == DiskNews(off=True)
    store.close()  # which waits for the readers
    assert not store.contents()


def test_a_read_ends_once_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    """Files that make way while they are read come or do not; a slot has one end."""
    store = BlockStore(BlockDirectory(tmp_path, 700), "model")
    store.start(BLOCK.shape, BLOCK.dtype)
    num_read = num_failed = 0
    for count in range(40):
        name = bytes([count]) * 16
        store.write(name, BLOCK)
        while name not in news_of(store).stored:
            pass
        store.read([(name, count)])
        store.write(bytes([count + 100]) * 16, BLOCK)
        while num_read + num_failed <= count:
            news = news_of(store)
            num_read, num_failed = num_read + len(news.read), num_failed + len(news.failed)
    store.close()
    assert num_read + num_failed == 40 and len(store.contents()) == num_read


def test_a_slow_disk_is_not_waited_for(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(
        store._directory, "write", lambda name, parts: (time.sleep(0.3), written.append(name))[1:0]
    )
    large = np.zeros(MAX_UNWRITTEN_BYTES // 2 + 1, np.uint8)
    for _ in range(3):
        store.write(ONE, large)
    news_of(store)
    assert len(written) == 1


def test_writing_in_the_end_stops_when_its_time_is_over(tmp_path: Path) -> None:
    now = [0.0]
    store = started(tmp_path, ending_s=2.0, clock=lambda: now[0])
    assert store.ending()
    now[0] = 1.9
    assert store.ending(), "the time begins with the first call"
    now[0] = 2.0
    assert not store.ending()
    store.close()
