"""Other bytes with the same xxh3-128 (and xxh3-64, of every seed that is 0): what a hostile disk can make of a
fragment within a second.

The accumulator of a lane adds, for each stripe of 64 bytes, the product of the two halves of (data XOR secret), and
the data itself to its neighbour. So four stripes of one lane can be changed such that the sum of their products and
the sum of their data stay: two have a half that is zero under the secret, and so no product.
"""

from __future__ import annotations

import random

MASK = (1 << 64) - 1
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
)
LANE = 0


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _product(value: int) -> int:
    return (value & 0xFFFFFFFF) * (value >> 32) & MASK


def _halves(product: int) -> tuple[int, int] | None:
    """Two numbers below 2^32 whose product it is, by its small divisors."""
    factors, left, divisor = [], product, 2
    while divisor * divisor <= left and divisor < 200_000:
        while left % divisor == 0:
            factors.append(divisor)
            left //= divisor
        divisor += 1 if divisor == 2 else 2
    if left > 1:
        factors.append(left)
    first = second = 1
    for factor in sorted(factors, reverse=True):
        if first <= second:
            first *= factor
        else:
            second *= factor
    return (first, second) if first < 1 << 32 and second < 1 << 32 else None


def second_preimage(data: bytes, rng: random.Random) -> bytes:
    """Of 1,088 bytes or more."""
    assert len(data) >= 1088, "the four stripes lie in the first block of 16, and none is the last stripe"
    keys = [_u64(SECRET, 8 * stripe + 8 * LANE) for stripe in range(4)]
    values = [_u64(data, 64 * stripe + 8 * LANE) for stripe in range(4)]
    products = sum(_product(value ^ key) for value, key in zip(values, keys, strict=True)) & MASK
    total = sum(values) & MASK
    while True:
        low, high = rng.getrandbits(32), rng.getrandbits(32)
        halves = _halves((products - low * high) & MASK)
        if halves is None:
            continue
        third, fourth = (low | high << 32) ^ keys[2], (halves[0] | halves[1] << 32) ^ keys[3]
        rest = (total - third - fourth) & MASK
        no_low, no_high = keys[0] & 0xFFFFFFFF, keys[1] >> 32
        free_low = (rest - no_low) & 0xFFFFFFFF
        free_high = ((rest - no_low - free_low - (no_high << 32)) >> 32) & 0xFFFFFFFF
        first, second = no_low | free_high << 32, free_low | no_high << 32
        if (first + second) & MASK != rest:
            continue
        forged = bytearray(data)
        for stripe, value in enumerate((first, second, third, fourth)):
            at = 64 * stripe + 8 * LANE
            forged[at : at + 8] = value.to_bytes(8, "little")
        if forged != data:
            return bytes(forged)
