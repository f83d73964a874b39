"""Erasure coding: the buffers it works on, and the arguments it refuses."""

from __future__ import annotations

import pytest

from storaged.cluster.layout import Profile
from storaged.objects.code import erasure
from storaged.objects.code.erasure import (
    CellRun,
    StripeSolver,
    encode_block,
    fragment_slices,
    parity_length,
    reconstruct,
)

PROFILE, CELL = Profile(4, 2), 64


def parity_buffers(size: int, extra: int = 0) -> list[memoryview]:
    return [memoryview(bytearray(b"\xee" * (parity_length(PROFILE, CELL, size) + extra))) for _ in range(2)]


def test_read_only_memory_slices_and_pooled_buffers_give_the_same_parity():
    sealed = bytes(range(250)) * 5
    expected = parity_buffers(len(sealed))
    encode_block(PROFILE, CELL, sealed, expected)
    pool = bytearray(b"junk" + sealed + b"more")
    for buffer in (bytearray(sealed), memoryview(sealed), memoryview(pool)[4 : 4 + len(sealed)]):
        parity = parity_buffers(len(sealed))
        encode_block(PROFILE, CELL, buffer, parity)
        assert parity == expected


def test_nothing_is_written_behind_the_parity_in_a_longer_buffer():
    parity = parity_buffers(1000, extra=50)
    encode_block(PROFILE, CELL, bytes(1000), parity)
    for buffer in parity:
        assert bytes(buffer[-50:]) == b"\xee" * 50
        assert not any(buffer[:-50])


def test_data_fragments_are_slices_of_the_block_not_copies():
    pool = bytearray(CELL * 9)
    cells = fragment_slices(PROFILE, CELL, pool, 1)
    assert [len(cell) for cell in cells] == [CELL, CELL]
    pool[CELL * 5] = 7
    assert cells[1][0] == 7


def test_whole_copies_are_the_block_itself():
    profile, block = Profile(1, 2), b"whole"
    parity = [memoryview(bytearray(5)) for _ in range(2)]
    encode_block(profile, CELL, block, parity)
    assert [bytes(copy) for copy in parity] == [block, block]
    assert fragment_slices(profile, CELL, block, 0) == [memoryview(block)]
    assert reconstruct(profile, {2: block}, [0, 1], 5) == {0: block, 1: block}


def test_the_pool_can_be_resized_after_the_call_because_nothing_stays_pinned():
    pool = bytearray(CELL * 4)
    parity = [bytearray(CELL), bytearray(CELL)]
    encode_block(PROFILE, CELL, pool, [memoryview(buffer) for buffer in parity])
    reconstruct(PROFILE, dict(enumerate([pool[:CELL]] * 4)), [5], CELL)
    pool.extend(b"x")
    with pytest.raises(ValueError, match="parity buffers"):
        encode_block(PROFILE, CELL, pool, [])
    pool.extend(b"x")


def test_reconstruction_accepts_more_than_k_and_uses_any():
    sealed = bytes(range(256))
    parity = parity_buffers(256)
    encode_block(PROFILE, CELL, sealed, parity)
    present = {i: sealed[i * CELL : (i + 1) * CELL] for i in (0, 1, 3)} | {4: bytes(parity[0]), 5: bytes(parity[1])}
    assert reconstruct(PROFILE, present, [2], CELL) == {2: sealed[2 * CELL : 3 * CELL]}
    assert reconstruct(PROFILE, present, [], CELL) == {}


@pytest.mark.parametrize(
    ("present", "wanted", "message"),
    [
        ({0: b"", 1: b"", 2: b""}, [3], "3 fragments are too few for 4\\+2"),
        ({0: b"", 1: b"", 2: b"", 6: b""}, [3], "positions of 4\\+2 are 0..5"),
        ({0: b"", 1: b"", 2: b"", 3: b""}, [-1], "positions of 4\\+2 are 0..5"),
        ({0: b"", 1: b"", 2: b"", 3: bytes(CELL + 1)}, [4], "longer than 64"),
    ],
)
def test_reconstruction_that_cannot_be_is_refused(present, wanted, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(PROFILE, present, wanted, CELL)


@pytest.mark.parametrize("positions", [range(3), range(5)])
def test_stripes_are_solved_from_k_fragments_and_no_other_number(positions):
    with pytest.raises(ValueError, match="fragments are not what"):
        StripeSolver(PROFILE, CELL, {position: CellRun(0, memoryview(bytes(CELL))) for position in positions}, [5])


def test_parity_that_does_not_fit_its_buffers_is_refused():
    for parity in ([], parity_buffers(256)[:1], [memoryview(bytearray(CELL)), memoryview(bytearray(CELL - 1))]):
        with pytest.raises(ValueError, match="needs 2 parity buffers of 64 bytes"):
            encode_block(PROFILE, CELL, bytes(256), parity)


def test_read_only_parity_is_refused():
    with pytest.raises(BufferError):
        encode_block(PROFILE, CELL, bytes(256), [memoryview(bytes(CELL)), memoryview(bytes(CELL))])


@pytest.mark.parametrize("profile", [Profile(0, 2), Profile(4, -1), Profile(250, 6)], ids=str)
def test_impossible_profiles_are_refused(profile):
    with pytest.raises(ValueError, match="cannot be"):
        fragment_slices(profile, CELL, b"", 0)


def test_a_position_that_holds_no_data_has_no_slices():
    with pytest.raises(ValueError, match=r"data fragments of 4\+2 are 0\.\.3"):
        fragment_slices(PROFILE, CELL, b"", 4)


def test_the_systems_library_is_not_looked_for_beside_the_one_of_the_wheel(monkeypatch):
    """That starts a compiler, in each process of each node."""
    monkeypatch.setattr(erasure.ctypes.util, "find_library", lambda _name: pytest.fail("it was looked for"))
    assert erasure._load()


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(erasure, "_candidates", lambda: ["/nonexistent/libisal.so"])
    with pytest.raises(ImportError, match="install the pyeclib wheel, or the system's libisal"):
        erasure._load()
