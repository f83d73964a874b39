"""Sealing and geometry for arbitrary sizes."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.layout import Profile
from storaged.objects.code.geometry import SAVED_MIN, BlockShape, PartShape, cell_bytes_for
from storaged.objects.code.seal import PartSealer, part_key
from storaged.objects.ports import pack_context
from storaged.sov1 import Opener, chunk_bytes_for, chunks_size, open_message, seal_message, sealed_size
from tests.examples import examples

DEK, DATA_ID, SALT = b"k" * 32, b"i" * 16, b"s" * 24
CHUNKS = [4096, 8192, 16384, 32768, 65536]

sizes = st.integers(0, 300_000) | st.builds(
    lambda chunk, count, more: max(0, (chunk - 16) * count + more),
    st.sampled_from(CHUNKS),
    st.integers(0, 4),
    st.integers(-2, 2),
)
shapes = st.builds(PartShape, sizes | st.integers(0, 2**43), st.sampled_from(CHUNKS), st.integers(1, 60))
profiles = st.builds(Profile, st.integers(1, 8), st.integers(1, 4))


@settings(max_examples=examples(60), deadline=None)
@given(sizes, st.sampled_from(CHUNKS), st.integers(1, 5), st.data())
def test_what_was_sealed_block_by_block_opens_chunk_by_chunk_and_in_blocks(size, chunk, block_cells, data):
    plain = random.Random(size).randbytes(size)
    sealer = PartSealer(DEK, DATA_ID, 1, chunk, SALT)
    shape = PartShape(size, chunk, block_cells)
    sealed, block_bytes = bytearray(), block_cells * shape.plain_bytes
    for block in range(shape.blocks):
        out = memoryview(bytearray(shape.block(block).sealed_bytes))
        piece = plain[block * block_bytes : (block + 1) * block_bytes]
        assert sealer.seal_block(block * block_cells, piece, out, last=block == shape.blocks - 1) == len(out)
        sealed += out
    assert 64 + len(sealed) == sealed_size(size, chunk)
    opener = Opener(part_key(DEK, sealer.header, DATA_ID, 1), size)
    first = data.draw(st.integers(0, shape.cells - 1))
    opened = bytearray(max(0, size - shape.plain_start(first)))
    assert opener.open_block(first, memoryview(sealed)[first * chunk :], memoryview(opened)) == len(opened)
    assert opened == plain[shape.plain_start(first) :]
    assert (
        opener.open(first, sealed[first * chunk : (first + 1) * chunk])
        == plain[shape.plain_start(first) : shape.plain_start(first + 1)]
    )


@settings(max_examples=examples(50), deadline=None)
@given(st.binary(max_size=20_000), st.lists(st.binary(max_size=40), max_size=4))
def test_messages_open_and_have_the_documented_size(plain, context):
    sealed = seal_message(DEK, "sov.meta.v1", pack_context(b"", context), plain, SALT)
    assert open_message(DEK, "sov.meta.v1", pack_context(b"", context), sealed) == plain
    assert len(sealed) == 64 + len(plain) + 16


def test_messages_of_many_chunks_open():
    plain = bytes(range(256)) * 1000
    assert open_message(DEK, "sov.meta.v1", b"", seal_message(DEK, "sov.meta.v1", b"", plain, SALT)) == plain


@given(st.integers(0, 2**43), st.integers(1, 8))
def test_the_chunk_is_the_smallest_power_of_two_with_which_a_part_fits_one_stripe_else_64_kib(size, k):
    chunk = chunk_bytes_for(size, k)
    assert chunk in CHUNKS
    assert chunk == 65536 or k * (chunk - 16) > size
    assert chunk == 4096 or k * (chunk // 2 - 16) <= size
    assert chunk_bytes_for(None, k) == 65536


@given(st.integers(0, 2_000_000), profiles)
def test_cells_of_a_part_are_half_as_large_where_that_saves_a_tenth_on_the_disks(size, profile):
    def coded(cell_bytes):
        block = PartShape(size, cell_bytes, 1000).block(0)
        return sum(block.fragment_length(profile, position) for position in range(profile.n))

    usual, chosen = chunk_bytes_for(size, profile.k), cell_bytes_for(profile, size)
    worth = profile.k > 1 and usual > CHUNKS[0] and coded(usual) - coded(usual // 2) >= SAVED_MIN * size
    assert chosen == (usual // 2 if worth else usual)


def test_a_part_just_above_a_power_of_two_takes_as_much_as_one_just_below():
    profile = Profile(4, 2)
    assert [cell_bytes_for(profile, size) for size in (16_384, 66_000, 131_000, 131_072, 262_144, 393_216, 2**20)] == [
        4096, 16_384, 32_768, 32_768, 65_536, 32_768, 65_536,
    ]  # fmt: skip
    assert cell_bytes_for(profile, None) == 65_536


@given(shapes)
def test_blocks_partition_the_sealed_stream(shape):
    assert shape.cells == shape.size // shape.plain_bytes + 1
    assert shape.sealed_bytes == chunks_size(shape.size, shape.cell_bytes)
    last = shape.block(shape.blocks - 1)
    assert 16 <= last.last_bytes < shape.cell_bytes
    assert 1 <= last.cells <= shape.block_cells
    assert (shape.blocks - 1) * shape.block_cells * shape.cell_bytes + last.sealed_bytes == shape.sealed_bytes


@given(st.integers(1, 60), st.integers(16, 4096), profiles)
def test_fragments_partition_the_cells_of_a_block(cells, last, profile):
    block = BlockShape(cells, 4096, last)
    by_fragment: dict[int, list[int]] = {}
    for cell in range(cells):
        by_fragment.setdefault(cell % profile.k, []).append(block.cell_length(cell))
    for position in range(profile.k):
        assert block.fragment_cells(profile, position) == len(by_fragment.get(position, []))
        assert block.fragment_length(profile, position) == sum(by_fragment.get(position, []))
    longest = [
        max(block.cell_length(cell) for cell in range(s * profile.k, min(cells, (s + 1) * profile.k)))
        for s in range(block.stripes(profile.k))
    ]
    assert longest == [block.stripe_length(profile.k, stripe) for stripe in range(block.stripes(profile.k))]
    for position in range(profile.k, profile.n):
        assert block.fragment_cells(profile, position) == len(longest)
        assert block.fragment_length(profile, position) == sum(longest)


@given(st.integers(1, 60), st.integers(1, 8), st.data())
def test_every_wanted_cell_is_read_from_exactly_its_fragment(cells, k, data):
    first = data.draw(st.integers(0, cells - 1))
    count = data.draw(st.integers(1, cells - first))
    found = {
        (cell.position, cell.first + i)
        for cell in BlockShape(cells, 4096, 16).holders(k, first, count)
        for i in range(cell.cells)
    }
    assert found == {(cell % k, cell // k) for cell in range(first, first + count)}
    assert sum(cell.cells for cell in BlockShape(cells, 4096, 16).holders(k, first, count)) == count


@given(shapes, st.data())
def test_a_range_is_found_in_the_cells_that_hold_its_bytes_and_no_others(shape, data):
    if not shape.size:
        assert list(shape.locate(0, 0)) == []
        return
    start = data.draw(st.integers(0, shape.size - 1))
    length = data.draw(st.integers(1, min(shape.size - start, 40 * shape.plain_bytes)))
    located = list(shape.locate(start, length))
    cells = [piece.block * shape.block_cells + piece.first + i for piece in located for i in range(piece.cells)]
    assert cells == list(range(start // shape.plain_bytes, (start + length - 1) // shape.plain_bytes + 1))
    assert all(piece.first + piece.cells <= shape.block(piece.block).cells for piece in located)
    assert 0 <= start - shape.plain_start(cells[0]) < shape.plain_bytes
