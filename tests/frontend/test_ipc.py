"""Frames: what arrives is what was sent, or a typed error."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.config.engine import EngineConfig
from jaxllm.ipc import (
    AsyncChannel,
    ChannelClosedError,
    FrameError,
    MessageDecoder,
    SyncChannel,
    encode_frame,
)
from jaxllm.messages import (
    AbortRequests,
    EngineCoreOutput,
    EngineCoreRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    ModelInfo,
    Shutdown,
    StepOutputs,
    ToEngine,
    TokenLogprobs,
)
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

REQUEST = EngineCoreRequest(
    "r1",
    (1, 2, 3),
    SamplingParams(
        stop=["a", "b"],
        logit_bias={5: -1.5},
        allowed_token_ids=[1, 2],
        seed=-3,
        output_kind=RequestOutputKind.DELTA,
    ),
    max_tokens=7,
    bad_words_token_ids=((1,), (2, 3)),
)
STEP = StepOutputs(
    3,
    ["a", "b"],
    [4, 5],
    [EngineCoreOutput("c", (1,), "stop", 2, (TokenLogprobs(1, -0.5, 1, [1, 2], [-0.5, -1.0]),))],
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "message", [REQUEST, AbortRequests(("a", "b")), Shutdown()], ids=lambda m: type(m).__name__
)
def test_messages_arrive_as_they_were_sent(pair: Any, message: Any) -> None:
    left, right = SyncChannel(pair[0], 9), SyncChannel(pair[1], 9)
    left.send(message)
    assert right.receive() == message


def test_integers_that_a_model_recommends_stay_so(pair: Any) -> None:
    left, right = SyncChannel(pair[0], 9), SyncChannel(pair[1], 9)
    info = ModelInfo("m", None, 8, 9, (), sampling_defaults={"top_k": 20, "temperature": 0.6})
    left.send(EngineReady(info))
    arrived = right.receive(EngineReady).info
    assert arrived == info and type(arrived.sampling_defaults["top_k"]) is int


def test_config_arrives_and_is_checked(pair: Any) -> None:
    left, right = SyncChannel(pair[0], 1), SyncChannel(pair[1], 1)
    config = EngineConfig(model="m", max_num_seqs=4)
    left.send(config)
    assert right.receive(EngineConfig) == config
    left.send({"model": "m", "block_size": 3})
    with pytest.raises(FrameError, match="power of two"):
        right.receive(EngineConfig)


def test_frames_of_another_generation_are_dropped(pair: Any) -> None:
    old, new, right = SyncChannel(pair[0], 1), SyncChannel(pair[0], 2), SyncChannel(pair[1], 2)
    old.send(AbortRequests(("old",)))
    new.send(AbortRequests(("new",)))
    assert right.receive() == AbortRequests(("new",))


def test_too_long_is_refused_on_both_sides(pair: Any) -> None:
    left = SyncChannel(pair[0], 1, max_bytes=64)
    with pytest.raises(FrameError, match="limit"):
        left.send(AbortRequests(("x" * 100,)))
    left.send(Shutdown())  # nothing of the long one was sent
    right = SyncChannel(pair[1], 1, max_bytes=64)
    assert right.receive() == Shutdown()
    pair[0].sendall(encode_frame(AbortRequests(("x" * 100,)), 1))
    with pytest.raises(FrameError, match="limit"):
        right.receive()


@pytest.mark.parametrize("cut", [0, 3, 8, 10])
def test_a_closed_end_is_told_apart(pair: Any, cut: int) -> None:
    pair[0].sendall(encode_frame(REQUEST, 1)[:cut])
    pair[0].close()
    with pytest.raises(ChannelClosedError):
        SyncChannel(pair[1], 1).receive()
    with pytest.raises(ChannelClosedError):
        for _ in range(3):
            SyncChannel(pair[1], 1).send(REQUEST)


@given(st.binary(max_size=200))
def test_garbage_is_a_frame_error_or_a_valid_message(payload: bytes) -> None:
    for union in (ToEngine, FromEngine, EngineConfig):
        with contextlib.suppress(FrameError):
            MessageDecoder(union)(payload)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_one_changed_byte_is_a_frame_error_or_a_valid_message(at: int, value: int) -> None:
    payload = bytearray(msgspec.msgpack.encode(REQUEST))
    payload[at % len(payload)] = value
    with contextlib.suppress(FrameError):
        MessageDecoder(ToEngine)(payload)


def test_async_side(pair: Any) -> None:
    async def main() -> None:
        channel = await AsyncChannel.open(pair[0], 5)
        worker = SyncChannel(pair[1], 5)
        big = EngineStats(1, 2, 0.5, 3, 4)

        def answer() -> None:
            assert worker.receive() == REQUEST
            for message in (STEP, big):
                worker.send(message)
            pair[1].sendall(b"\x00\x00\x00\x01\x00\x00\x00\x05\xc1")

        thread = threading.Thread(target=answer)
        thread.start()
        channel.send(REQUEST)
        assert await channel.receive() == STEP
        assert await channel.receive() == big
        with pytest.raises(FrameError):
            await channel.receive()
        thread.join()
        pair[1].close()
        with pytest.raises(ChannelClosedError):
            await channel.receive()
        channel.close()
        with pytest.raises(ChannelClosedError):
            channel.send(REQUEST)

    asyncio.run(main())
