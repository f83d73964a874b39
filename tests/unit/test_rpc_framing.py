"""Frames: whatever the pieces they arrive in, what was sent is what is delivered; what is malformed is refused before
memory is given to it.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.rpc.framing import (
    BODY_BYTES_MAX,
    HEAD_BYTES_MAX,
    HEADER_BYTES,
    FrameError,
    FrameReader,
    Kind,
    Verdict,
    pack_header,
)
from tests.examples import examples

SCRATCH = 64

frames_strategy = st.lists(
    st.tuples(
        st.sampled_from(list(Kind)),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=200),
        st.binary(max_size=200),
        st.integers(0, 2**32 - 1),
    ),
    max_size=12,
)


def wire_of(frames: list[tuple[Kind, int, bytes, bytes, int]]) -> bytes:
    return b"".join(
        pack_header(kind, number, len(head), len(body), deadline) + head + body
        for kind, number, head, body, deadline in frames
    )


class Sink:
    def __init__(self, scratch_bytes: int = SCRATCH) -> None:
        self.frames: list[tuple[int, int, bytes, bytes, int]] = []
        self.asked: list[tuple[int, int]] = []
        self.verdicts: list[Verdict] = []
        self.reader = FrameReader(self.admit, self.deliver, scratch_bytes)

    def admit(self, kind: int, request_id: int, head_bytes: int, body_bytes: int) -> Verdict:
        self.asked.append((head_bytes, body_bytes))
        return self.verdicts.pop(0) if self.verdicts else Verdict.TAKE

    def deliver(self, kind: int, request_id: int, deadline_ms: int, head: memoryview, body: memoryview) -> None:
        self.frames.append((kind, request_id, bytes(head), bytes(body), deadline_ms))

    def feed(self, data: bytes, most: int) -> int:
        """Gives up to ``most`` bytes; how many were taken."""
        buffer = self.reader.buffer()
        assert len(buffer) > 0
        count = min(len(buffer), most, len(data))
        buffer[:count] = data[:count]
        self.reader.received(count)
        return count


@given(frames_strategy, st.lists(st.integers(1, 300), min_size=1, max_size=20), st.sampled_from([48, 64, 100, 1000]))
def test_frames_survive_any_cut(
    frames: list[tuple[Kind, int, bytes, bytes, int]], pieces: list[int], scratch_bytes: int
) -> None:
    sink = Sink(scratch_bytes)
    wire = wire_of(frames)
    at = step = 0
    while at < len(wire):
        at += sink.feed(wire[at:], pieces[step % len(pieces)])
        step += 1
    assert sink.frames == frames
    assert not sink.reader.mid_frame


@given(frames_strategy, st.data())
def test_a_reader_that_is_made_to_wait_loses_and_repeats_nothing(
    frames: list[tuple[Kind, int, bytes, bytes, int]], data: st.DataObject
) -> None:
    sink = Sink()
    sink.verdicts = data.draw(st.lists(st.sampled_from([Verdict.TAKE, Verdict.WAIT]), max_size=20))
    wire = wire_of(frames)
    at = 0
    while at < len(wire) or sink.reader.waiting:
        if sink.reader.waiting:
            sink.reader.resume()
        else:
            at += sink.feed(wire[at:], 50)
    assert sink.frames == frames


@given(frames_strategy, st.data())
def test_skipped_frames_vanish_whole(frames: list[tuple[Kind, int, bytes, bytes, int]], data: st.DataObject) -> None:
    sink = Sink()
    skips = [data.draw(st.booleans()) for _ in frames]
    sink.verdicts = [Verdict.SKIP if skip else Verdict.TAKE for skip in skips]
    wire = wire_of(frames)
    at = 0
    while at < len(wire):
        at += sink.feed(wire[at:], 37)
    assert sink.frames == [frame for frame, skip in zip(frames, skips, strict=True) if not skip]


@settings(max_examples=examples(300))
@given(st.binary(min_size=HEADER_BYTES, max_size=200))
def test_bytes_that_are_no_frames_are_refused_or_stay_within_bounds(data: bytes) -> None:
    sink = Sink()
    at = 0
    try:
        while at < len(data):
            at += sink.feed(data[at:], 64)
    except FrameError:
        return
    for head_bytes, body_bytes in sink.asked:
        assert head_bytes <= HEAD_BYTES_MAX
        assert body_bytes <= BODY_BYTES_MAX


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", "not a storaged frame"),
        (b"SR\x02" + pack_header(Kind.HELLO, 0, 0)[3:], "protocol version 2"),
        (b"SR\x03\x63" + pack_header(Kind.HELLO, 0, 0)[4:], "unknown kind"),
        (pack_header(Kind.HELLO, 0, 0)[:12] + (HEAD_BYTES_MAX + 1).to_bytes(4, "big") + bytes(8), "over the limit"),
        (pack_header(Kind.HELLO, 0, 0)[:16] + (BODY_BYTES_MAX + 1).to_bytes(4, "big") + bytes(4), "over the limit"),
    ],
)
def test_a_bad_header_is_refused_with_its_reason_and_nothing_is_admitted(raw: bytes, complaint: str) -> None:
    sink = Sink()
    with pytest.raises(FrameError, match=complaint):
        sink.feed(raw, 64)
    assert sink.asked == []


def test_a_frame_over_the_limits_is_not_made() -> None:
    with pytest.raises(ValueError):
        pack_header(Kind.REQUEST, 1, HEAD_BYTES_MAX + 1)
    with pytest.raises(ValueError):
        pack_header(Kind.REQUEST, 1, 0, BODY_BYTES_MAX + 1)
    sink = Sink()
    sink.feed(pack_header(Kind.REQUEST, 1, HEAD_BYTES_MAX, BODY_BYTES_MAX), 64)
    assert sink.asked == [(HEAD_BYTES_MAX, BODY_BYTES_MAX)]


def test_a_large_body_is_received_into_memory_of_its_announced_size_without_another_copy() -> None:
    sink = Sink()
    bodies: list[memoryview] = []
    sink.reader = FrameReader(
        sink.admit, lambda kind, request_id, deadline_ms, head, body: bodies.append(body), SCRATCH
    )
    header = pack_header(Kind.REPLY, 1, 2, 1000)
    first = sink.reader.buffer()
    first[: len(header) + 2] = header + b"hd"
    sink.reader.received(len(header) + 2)
    target = sink.reader.buffer()
    assert len(target) == 1000
    target[:] = b"x" * 1000
    sink.reader.received(1000)
    assert bodies[0].obj is target.obj


def test_the_header_is_laid_out_as_documented() -> None:
    assert (
        pack_header(Kind.REQUEST, 0x0102030405060708, 0x11, 0x22, 0x33).hex()
        == "535203040102030405060708000000110000002200000033"
    )
