"""What a node that is certified, and hostile, puts into messages: others refuse it, forget it, and go on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from storaged.cluster.ports import Call, Method
from storaged.cluster.rpc import RpcPool, RpcServer, faults
from storaged.cluster.rpc.framing import ErrorHead
from storaged.errors import PeerError, PeerRefused
from storaged.observe.logs import logfmt
from storaged.units import MIB
from storaged.wire import Message, decode, encode
from tests.patience import GUARD_S
from tests.worlds.authority import ROLES, Note, Service, World, pooled, serving

NOT_UTF8 = b"\xa2\xff\xfe"
DEEP = b"\x91" * 100_000
FUZZ_ROUNDS = 2000


class Crafted(Message, frozen=True):
    """A Note whose fields are any bytes."""

    text: msgspec.Raw
    number: msgspec.Raw = msgspec.Raw(b"\x00")
    more: msgspec.Raw = msgspec.Raw(b"\xc0")


CRAFTED = {
    "a text that is not UTF-8": Crafted(msgspec.Raw(NOT_UTF8)),
    "a field of a later version that is nested too deep": Crafted(msgspec.Raw(b"\xa1a"), more=msgspec.Raw(DEEP)),
    "a list of four thousand million": Crafted(msgspec.Raw(b"\xdd\xff\xff\xff\xff")),
    "not a number": Crafted(msgspec.Raw(b"\xa1a"), msgspec.Raw(b"\xcb\x7f\xf8\0\0\0\0\0\0")),
}


async def crafted_reply(request: Note, _call: Call) -> Crafted:
    return CRAFTED[request.text]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[RpcServer, RpcPool]]:
    world = World(tmp_path)
    methods = {**Service().methods(), "t.crafted": Method(Note, crafted_reply, ROLES)}
    async with (
        serving(world.node("n1"), methods) as server,
        pooled(world.node("gw", ("gateway",)), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        yield server, pool


@pytest.mark.parametrize("what", CRAFTED)
async def test_a_crafted_request_is_a_bad_message_and_takes_no_room_from_others(
    pair: tuple[RpcServer, RpcPool], what: str
) -> None:
    server, pool = pair
    for _ in range(3):
        async with asyncio.timeout(GUARD_S):
            with pytest.raises(PeerRefused) as error:
                await pool.call("n1", "t.echo", CRAFTED[what], Note, body=[bytes(MIB)])
        assert error.value.remote_code == faults.BAD_MESSAGE
    assert server.statistics().inflight_bytes == 0
    assert pool.statistics().links[0].connects == 1


@pytest.mark.parametrize("what", CRAFTED)
async def test_a_crafted_answer_fails_its_call_which_does_not_wait_for_ever(
    pair: tuple[RpcServer, RpcPool], what: str
) -> None:
    _server, pool = pair
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(PeerRefused) as error:
            await pool.call("n1", "t.crafted", Note(what), Note, timeout_s=5)
    assert error.value.remote_code == faults.BAD_REPLY
    assert (await pool.call("n1", "t.echo", Note("still there"), Note))[0].text == "still there"


async def test_frames_with_random_messages_are_answered_and_leave_nothing_behind(
    pair: tuple[RpcServer, RpcPool],
) -> None:
    server, pool = pair
    rng = random.Random(11)
    good = encode(Note("a text", 70_000))[1:]
    for _ in range(FUZZ_ROUNDS):
        data = bytearray(good)
        for _change in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        raw = msgspec.Raw(bytes(data[: rng.randint(1, len(data))]))
        async with asyncio.timeout(GUARD_S):
            try:
                await pool.call("n1", "t.echo", Crafted(raw), Note, body=[b"x" * rng.choice((0, 1, 5000))])
            except PeerRefused as error:
                assert error.remote_code == faults.BAD_MESSAGE  # noqa: PT017
    assert server.statistics().inflight_bytes == 0
    assert pool.statistics().links[0].connects == 1


def test_decoding_raises_one_kind_of_error_whatever_the_bytes_are() -> None:
    rng, refused = random.Random(12), 0
    for _ in range(20_000):
        data = b"\x92" + rng.randbytes(rng.randint(1, 40))
        for kind in (ErrorHead, Note):
            try:
                decode(data, kind)
            except msgspec.MsgspecError:
                refused += 1
    assert 30_000 < refused < 40_000, "nearly all are refused, and some are messages"


def test_what_another_node_says_of_an_error_is_short_and_has_no_control_characters() -> None:
    said = "\x1b[2J\nlevel=info event=forged" + "x" * MIB
    error: PeerError = faults.from_head(
        ErrorHead("C" * MIB, said, {said: said, **{str(n): "" for n in range(999)}}, said), "n1"
    )
    assert isinstance(error, PeerRefused)
    for text in (error.message, error.remote_code, *error.details, *error.details.values()):
        assert text.isprintable()
        assert len(text) <= faults.MESSAGE_CHARS_MAX + 10
    assert len(error.details) <= faults.DETAILS_MAX


def test_a_line_of_the_log_has_no_control_characters() -> None:
    assert logfmt({"event": "x", "reason": "a\x1b[2J\x9bb\u2028\ud800"}).isprintable()
