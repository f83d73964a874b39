"""Erasure coding against an independent implementation of the same code, and any k of n."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.layout import Profile
from storaged.hashes import fragment_hash
from storaged.objects.code.erasure import (
    CellRun,
    StripeSolver,
    encode_block,
    fragment_hashes,
    fragment_slices,
    parity_length,
    reconstruct,
)
from storaged.objects.code.geometry import BlockShape
from tests.examples import examples

ALL_PROFILES = [Profile(k, m) for k in range(1, 9) for m in range(1, 5)]


def multiply(a: int, b: int) -> int:
    """In GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1, bit by bit."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return product


INVERSE = {a: next(b for b in range(1, 256) if multiply(a, b) == 1) for a in range(1, 256)}
TABLES = [bytes(multiply(a, b) for b in range(256)) for a in range(256)]


def slow_parity(profile: Profile, cell_bytes: int, sealed: bytes) -> list[bytes]:
    """Parity of the block, stripe by stripe: parity row i is the sum of cell j / (i XOR j)."""
    stripes = []
    for start in range(0, len(sealed), profile.k * cell_bytes):
        stripe = sealed[start : start + profile.k * cell_bytes]
        width = min(cell_bytes, len(stripe))
        stripes.append(
            ([stripe[j * cell_bytes : (j + 1) * cell_bytes].ljust(width, b"\0") for j in range(profile.k)], width)
        )
    rows = []
    for i in range(profile.k, profile.n):
        row = b""
        for cells, width in stripes:
            total = 0
            for j, cell in enumerate(cells):
                factor = 1 if profile.k == 1 else INVERSE[i ^ j]
                total ^= int.from_bytes(cell.translate(TABLES[factor]), "big")
            row += total.to_bytes(width, "big")
        rows.append(row)
    return rows


def fragments_of(profile: Profile, cell_bytes: int, sealed: bytes) -> list[bytes]:
    parity = [memoryview(bytearray(parity_length(profile, cell_bytes, len(sealed)))) for _ in range(profile.m)]
    encode_block(profile, cell_bytes, sealed, parity)
    data = [b"".join(fragment_slices(profile, cell_bytes, sealed, position)) for position in range(profile.k)]
    return [*data, *map(bytes, parity)]


blocks = st.tuples(
    st.sampled_from(ALL_PROFILES),
    st.sampled_from([1, 16, 31, 64, 100, 4096]),
    st.integers(0, 40),
    st.integers(0, 4096),
    st.integers(0, 2**32),
).map(lambda drawn: (drawn[0], drawn[1], random.Random(drawn[4]).randbytes(drawn[1] * drawn[2] + drawn[3] % drawn[1])))


@settings(max_examples=examples(150), deadline=None)
@given(blocks)
def test_parity_is_what_the_slow_implementation_computes(block):
    profile, cell_bytes, sealed = block
    assert fragments_of(profile, cell_bytes, sealed)[profile.k :] == slow_parity(profile, cell_bytes, sealed)


@settings(max_examples=examples(150), deadline=None)
@given(blocks, st.data())
def test_any_k_fragments_give_back_all_the_others(block, data):
    profile, cell_bytes, sealed = block
    fragments = fragments_of(profile, cell_bytes, sealed)
    kept = data.draw(st.permutations(range(profile.n)))[: profile.k]
    length = parity_length(profile, cell_bytes, len(sealed))
    wanted = [position for position in range(profile.n) if position not in kept]
    rebuilt = reconstruct(profile, {position: memoryview(fragments[position]) for position in kept}, wanted, length)
    assert list(rebuilt) == wanted
    for position in wanted:
        assert len(rebuilt[position]) == length
        assert rebuilt[position] == fragments[position].ljust(length, b"\0")


@settings(max_examples=examples(100), deadline=None)
@given(blocks.filter(lambda drawn: drawn[0].k > 1), st.data())
def test_stripe_after_stripe_any_k_runs_of_cells_give_back_what_they_do_at_once(block, data):
    profile, cell_bytes, sealed = block
    fragments = fragments_of(profile, cell_bytes, sealed)
    kept = data.draw(st.permutations(range(profile.n)))[: profile.k]
    wanted = [position for position in range(profile.n) if position not in kept]
    runs = {}
    for position in kept:
        first = data.draw(st.integers(0, 3))
        runs[position] = CellRun(first, memoryview(fragments[position])[first * cell_bytes :])
    solver = StripeSolver(profile, cell_bytes, runs, wanted)
    whole = {position: fragments[position] for position in kept}
    truth = reconstruct(profile, whole, wanted, parity_length(profile, cell_bytes, len(sealed)))
    assert solver.first == max(run.first for run in runs.values())
    for stripe in range(solver.first, solver.end):
        solved = solver.solve(stripe)
        assert list(solved) == wanted
        for position in wanted:
            assert solved[position] == truth[position][stripe * cell_bytes : (stripe + 1) * cell_bytes]
    for stripe in (solver.first - 1, max(solver.end, solver.first)):
        with pytest.raises(ValueError, match=f"stripe {stripe} is not one of"):
            solver.solve(stripe)


@pytest.mark.parametrize("profile", ALL_PROFILES, ids=str)
def test_every_set_of_survivors_of_every_profile_rebuilds_a_ragged_stripe(profile):
    sealed = random.Random(1).randbytes(64 * (profile.k - 1) + 17 if profile.k > 1 else 64)
    fragments = fragments_of(profile, 64, sealed)
    for kept in combinations(range(profile.n), profile.k):
        wanted = [position for position in range(profile.n) if position not in kept]
        rebuilt = reconstruct(profile, {position: fragments[position] for position in kept}, wanted, 64)
        assert all(rebuilt[position] == fragments[position].ljust(64, b"\0") for position in wanted)


@settings(max_examples=examples(100), deadline=None)
@given(blocks)
def test_fragments_have_the_lengths_that_geometry_says_and_hash_as_they_are(block):
    profile, cell_bytes, sealed = block
    fragments = fragments_of(profile, cell_bytes, sealed)
    hashes = fragment_hashes(profile, cell_bytes, sealed, fragments[profile.k :])
    assert hashes == tuple(fragment_hash((fragment,)) for fragment in (fragments if profile.k > 1 else fragments[:1]))
    if sealed:
        cells = -(-len(sealed) // cell_bytes)
        shape = BlockShape(cells, cell_bytes, len(sealed) - (cells - 1) * cell_bytes)
        assert [len(fragment) for fragment in fragments] == [
            shape.fragment_length(profile, position) for position in range(profile.n)
        ]
