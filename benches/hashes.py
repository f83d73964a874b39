"""``python -m benches.hashes``: the cost of the hashes that protect fragments and pages, and of alternatives."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable

import xxhash

from storaged.hashes import fragment_hash

SIZES = (300, 1024, 4112, 16_400, 65_536, 786_432, 3 * 1024 * 1024)
KINDS: dict[str, Callable[[bytes], bytes]] = {
    "xxh3-128 (as before)": xxhash.xxh3_128_digest,
    "fragment_hash": lambda data: fragment_hash((data,)),
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
    "BLAKE2b-160": lambda data: hashlib.blake2b(data, digest_size=20, person=b"sov.fragment.v1").digest(),
    "BLAKE2s-160": lambda data: hashlib.blake2s(data, digest_size=20, person=b"sovfrag1").digest(),
}


def best_s(work: Callable[[bytes], bytes], data: bytes) -> float:
    count = max(3, 2_000_000 // (len(data) + 1000))
    found = []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(count):
            work(data)
        found.append((time.perf_counter() - began) / count)
    return min(found)


def main() -> None:
    print(f"{'bytes':>9}  " + "  ".join(f"{name:>24}" for name in KINDS))
    for size in SIZES:
        data = os.urandom(size)
        cells = [best_s(work, data) for work in KINDS.values()]
        print(f"{size:>9}  " + "  ".join(f"{1e6 * took:>11.2f} us {size / took / 1e6:>6,.0f} MB/s" for took in cells))


if __name__ == "__main__":
    main()
