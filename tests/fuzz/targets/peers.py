"""What a hostile storage node may send to a gateway: frames, messages, rows, answers about listings, reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import xxhash

from storaged import wire
from storaged.cluster.rpc import framing
from storaged.cluster.rpc.framing import FrameError, FrameReader, Kind, Verdict, pack_header
from storaged.errors import DataDamaged, ServiceUnavailable, StoragedError
from storaged.meta import messages
from storaged.meta.consensus.quorums import View
from storaged.meta.listing import agreement, query
from storaged.meta.names import Ballot, Table, Value
from storaged.meta.storage import rowvalue
from storaged.meta.storage.row_head import head_of
from storaged.meta.store_ports import RowDamaged, Slot
from storaged.meta.transport.read_batching import ReadBatcher
from storaged.objects.code.versions import decode_record
from storaged.objects.records import (
    ObjectRecord,
    decode_heads,
    encode_object,
)
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, cut
from tests.fuzz.targets.stored import ENTRY, HEADER, MSGPACK, NAME, VERSION
from tests.unit.test_formats_readable import kinds_of_messages
from tests.worlds.receiving import feed

SCRATCH = 4096


def frames(data: bytes) -> None:
    """However a stream of frames is cut, the same frames come out of it, or the same error ends it. A frame gets memory
    only once it was admitted, and never more than the limits of the protocol."""
    choices = Choices(data)
    step, stream = choices.pick((1, 7, 24, 4000)), choices.rest()
    assert _frames_of(stream, step) == _frames_of(stream, 4000)


def _frames_of(stream: bytes, step: int) -> list[Any]:
    found: list[Any] = []

    def admit(kind: int, request_id: int, head_bytes: int, body_bytes: int) -> Verdict:
        assert head_bytes <= framing.HEAD_BYTES_MAX
        assert body_bytes <= framing.BODY_BYTES_MAX
        found.append((kind, request_id, head_bytes, body_bytes))
        return Verdict.SKIP if head_bytes + body_bytes > 100_000 else Verdict.TAKE

    def deliver(kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        found.append((kind, request_id, deadline_ms, bytes(head), bytes(body)))

    reader = FrameReader(admit, deliver, SCRATCH)
    try:
        for piece in cut(stream, step):
            feed(reader, piece)
    except FrameError as error:
        found.append(str(error))
    return found


KINDS = {kind.__name__: kind for kind in kinds_of_messages().values()}


def message(data: bytes) -> None:
    """Bytes give a message of their kind, or MsgspecError and no other error. A message that is encoded again decodes
    to the same message.
    """
    choices = Choices(data)
    kind = KINDS.get(choices.line().decode("latin-1"))
    if kind is None:
        return
    raw = choices.rest()
    try:
        found = wire.decode(raw, kind)
    except msgspec.MsgspecError:
        return
    again = wire.encode(found)
    assert wire.encode(wire.decode(again, kind)) == again


def row(data: bytes) -> None:
    """A row with any content, under a check that is right for it (a liar can make one): code that reads rows of another
    node raises only what its callers expect. A row that is taken is packed again to the same bytes."""
    seed = rowvalue.seed_of(NAME.prefix)
    forged = data[:1] + xxhash.xxh3_64_digest(data[1:] + NAME.key, seed) + data[1:]
    assert rowvalue.sound_check(seed, NAME.key, forged) in (forged[1:9], b"")
    try:
        found = rowvalue.unpack_row(NAME, forged)
    except RowDamaged:
        found = None
    if (
        found is not None
        and forged[0] in (1, 2)
        and (forged[0] == 2) == found.copied
        and not (found.value.payload and forged[0] == 1)
    ):
        packed = rowvalue.pack_row(found)
        assert rowvalue.unpack_row(NAME, packed) == found
    try:  # as ``proposer.read`` does
        value = rowvalue.value_of(forged)
    except (msgspec.MsgspecError, IndexError):
        return
    head_of(value.body)
    try:
        decode_record(value)
    except DataDamaged:
        pass
    rowvalue.hash_of(forged)


def ballot(data: bytes) -> None:
    """Bytes give a ballot that a row can hold, or ValueError."""
    try:
        found = rowvalue.unpack_ballot(data)
    except ValueError:
        return
    assert found == rowvalue.unpack_ballot(data)
    slot = Slot(NAME, found, Value(1, b"o" * 16, 2, b""), False)
    assert rowvalue.row_parts(rowvalue.pack_row(slot)).ballot == data


VIEW = View.of(1, ("a", "b", "c"))


def listed(data: bytes) -> None:
    """Whatever one replica of three answers for a range, a listing has the rows on which the two others agree, or fails
    with ServiceUnavailable, or asks the registers. The liar adds no key and hides none.
    """
    choices = Choices(data)
    heads, delimiter = choices.flag(), choices.pick((b"", b"/"))
    try:
        lie = wire.decode(choices.rest(), messages.ShardSlice)
    except msgspec.MsgspecError:
        return
    asked = query.Query(Table.OBJECT, b"S" * 16, b"", delimiter, 2, heads=heads)
    feed = query.Feed(3, VIEW, "a", b"")
    truth = _truth()
    answers = {"a": lie, "b": truth, "c": truth}
    try:
        for answer in answers.values():
            agreement.rows_after(b"", answer)
        settled = agreement.settle_by_majority(asked, feed, answers)
        piece = agreement.assemble(asked, settled)
    except ServiceUnavailable:
        return
    true_keys = {row.key for row in _rows()}
    assert set(piece.keys) <= true_keys, "a key that a liar invented is listed"
    if not delimiter:
        known = {key for key in true_keys if piece.done or key <= piece.through}
        assert known <= set(piece.keys) | set(settled.doubtful), "a key that a liar hides is not listed"
    if heads:
        try:
            decode_heads(piece.held)
        except msgspec.MsgspecError:
            pass


def _rows() -> list[messages.ScanRow]:
    held = rowvalue.row_parts(
        rowvalue.pack_row(Slot(NAME, Ballot(1, 5, "n1", b"i" * 8), Value(1, b"o" * 16, 2, b"x"), False))
    )
    return [messages.ScanRow(key, held.ballot, 2, Value(1, b"o" * 16, 2, b"x")) for key in (b"a", b"d/1", b"d/2", b"z")]


def _truth() -> messages.ShardSlice:
    return messages.ShardSlice(3, b"z", True, 7, wire.encode(_rows()), 4)


class _Caller:
    """Answers each call with what a node says."""

    def __init__(self, replies: list[Any]) -> None:
        self._replies = replies
        self.calls = 0

    def try_call(self, node: str, method: str, request: Any, kind: Any, on_reply: Any, *, timeout_s: float) -> bool:
        self.calls += 1
        reply = self._replies.pop(0) if self._replies else None
        if reply is None:
            return False
        on_reply(reply, memoryview(b"0123456789"))
        return True


def reads(data: bytes) -> None:
    """Whatever a node answers to many reads, each read gets exactly one result: a row, no row, or an error. Nothing is
    asked again that was not asked.
    """
    choices = Choices(data)
    replies: list[Any] = []
    for raw in choices.rest().split(b"||")[:4]:
        try:
            replies.append(wire.decode(raw, messages.ReadsReply))
        except msgspec.MsgspecError:
            continue
    heard: dict[int, int] = {}
    caller = _Caller(replies)
    batcher = ReadBatcher(caller, "n1")  # type: ignore[arg-type]
    wanted = [(disk, bytes((form,)) + NAME.pack()) for disk in ("a", "b") for form in (0, 1, 2)]
    gathered: dict[str, tuple[list[bytes], list[Any]]] = {}
    for number, (disk, ask) in enumerate(wanted):

        def on_row(found: Any, copy: memoryview, number: int = number) -> None:
            assert found is None or isinstance(found, bytes | StoragedError)
            heard[number] = heard.get(number, 0) + 1

        asks, callbacks = gathered.setdefault(disk, ([], []))
        asks.append(ask)
        callbacks.append(on_row)
    request = messages.Reads(1, list(gathered), [asks for asks, _ in gathered.values()])
    reply = replies.pop(0) if replies else None
    if reply is None:
        return
    assert request.asks
    batcher._on_reply(1, 1.0, gathered, reply, memoryview(b"0123456789"))
    assert heard == dict.fromkeys(range(len(wanted)), 1), "a read hears nothing, or twice"
    assert caller.calls <= len(wanted)


def _careless_ballot(packed: bytes) -> Ballot:
    epoch, counter, node_bytes, _ = rowvalue._BALLOT.unpack_from(packed.ljust(18, b"\0"))
    return Ballot(epoch, counter, packed[18 : 18 + node_bytes].decode(), packed[18 + node_bytes :])


_ROW = rowvalue.pack_row(
    Slot(NAME, Ballot(1, 5, "n1", b"i" * 8), Value(1, b"o" * 16, 2, encode_object(ObjectRecord((VERSION,)))), False)
)
_INVENTED = messages.ScanRow(b"b", _rows()[0].ballot, 2, Value(1, b"o" * 16, 2, b"x"))
_EXAMPLES = (
    framing.Hello("text", "n1", b"i" * 8, 3),
    framing.ErrorHead("text", "text", {"text": "text"}, "text"),
    messages.ReadsReply([[_ROW]], [5]),
    messages.ScanReply(0, (_truth(),)),
    messages.AcceptsReply(
        [messages.AcceptReply(0, Ballot(1, 2, "text", b"i" * 8))], {1: framing.ErrorHead("text", "", {})}
    ),
    messages.ReadReply(
        0, Ballot(1, 2, "text", b"i" * 8), b"d" * 8, Value(1, b"o" * 16, 2, b"x"), b"p" * 16, wire.encode(HEADER)
    ),
    ObjectRecord((VERSION,)),
    ENTRY,
    HEADER,
)

TARGETS = (
    Target(
        "frames",
        frames,
        (
            b"\x00" + pack_header(Kind.REQUEST, 1, 3, 2, 5) + b"abcde" + pack_header(Kind.REPLY, 2, 1) + b"x",
            b"\x02" + pack_header(Kind.ERROR, 1, 5000) + b"h" * 5000 + pack_header(Kind.CANCEL, 3, 0),
            b"\x01" + pack_header(Kind.REPLY, 9, 0, 101_000) + b"b" * 3000,
        ),
        Plant(FrameReader, "_skip", lambda _: lambda self, start, size: min(start + size, self._end)),
        tuple(pack_header(kind, 7, 2, 1) for kind in Kind),
        size_max=8192,
        steps=3000,
        steps_a_byte=120,
        peak_bytes=2 << 20,
    ),
    Target(
        "message",
        message,
        tuple(
            type(example).__name__.encode() + b"\n" + raw
            for example in _EXAMPLES
            for raw in (wire.encode(example), wire.encode(example).replace(b"text", b"te\xff\xfe"))
        ),
        Plant(wire, "decode", lambda _: lambda data, kind: wire.decoder_of(kind)(data)),
        (*MSGPACK, *(f"{name}\n".encode() for name in KINDS)),
    ),
    Target(
        "row",
        row,
        (_ROW[:1] + _ROW[9:], b"\x01", b"\x02\x02" + b"\0" * 18),
        Plant(rowvalue, "msgspec", lambda _: SimpleNamespace(MsgspecError=KeyError)),
        MSGPACK,
    ),
    Target(
        "ballot",
        ballot,
        (rowvalue.row_parts(_ROW).ballot, b"", b"\0" * 18),
        Plant(rowvalue, "unpack_ballot", lambda _: _careless_ballot),
        (),
        size_max=128,
    ),
    Target(
        "listed",
        listed,
        (
            b"\x00\x00" + wire.encode(_truth()),
            b"\x00\x01" + wire.encode(messages.ShardSlice(3, b"m", False, 1, wire.encode(_rows()[:2]), 2)),
            b"\x00\x00" + wire.encode(messages.ShardSlice(3, b"z", True, 1, wire.encode([*_rows(), _INVENTED]), 5)),
            b"\x01\x00" + wire.encode(messages.ShardSlice(3, b"z", True, 1, keys=(b"a", b"b"), heads=(b"x", b"y"))),
        ),
        Plant(
            agreement,
            "_agreed",
            lambda _: lambda view, rows: next(((its.ballot, its.value) for its in rows.values()), None),
        ),
        (*MSGPACK, wire.encode(_rows()[0])[1:]),
        size_max=2048,
        steps=6000,
        steps_a_byte=200,
    ),
    Target(
        "reads",
        reads,
        (
            wire.encode(messages.ReadsReply([[_ROW, _ROW[1:9], _ROW], [b"", None, b"h" * 16]], [5, 2])),
            wire.encode(messages.ReadsReply([[_ROW]], [-3])),
            wire.encode(messages.ReadsReply([[None, None, None]], []))
            + b"||"
            + wire.encode(messages.ReadsReply([], [])),
        ),
        Plant(ReadBatcher, "_call", lambda _: lambda self, request, on_reply, timeout_s: None),
        MSGPACK,
        size_max=2048,
    ),
)
