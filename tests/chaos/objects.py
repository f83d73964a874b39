"""A set of objects that is written once, stays as it is, and is compared after everything that was done to the cluster;
and where their fragments are, so that what a change moved can be weighed.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from tests.chaos.away import Block
from tests.servers import Servers

KIB, MIB = 1024, 1024 * 1024
CLASSES = ((1, 64), (64, 4 * KIB), (4 * KIB, 16 * KIB), (16 * KIB, 256 * KIB), (256 * KIB, 1 * MIB))
"""(least, most) bytes. Objects take the classes in turn; a few are larger (``LARGE``)."""
LARGE = {100: 2 * MIB, 400: 8 * MIB, 1000: 64 * MIB}
"""Every so many objects one has so many bytes. Sizes from 1 B to 64 MiB; the mean is about 250 KiB."""
ATTEMPTS = 8

Places = Mapping[str, list[tuple[str, int]]]
"""For each key its fragments: (disk, bytes)."""


class Moved(NamedTuple):
    """Bytes of fragments on other disks than before, and the fewest that any way to the same shares would move."""

    bytes: int
    ideal: int


class Objects:
    def __init__(self, make_client: Callable[[], Any], bucket: str, count: int, *, seed: int = 1) -> None:
        self._make_client = make_client
        self._bucket = bucket
        self._seed = seed
        self.keys = [f"object/{number:05d}" for number in range(count)]
        self.wrong: list[str] = []
        self.reads = 0
        self.failed_twice = 0
        self._stopped = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        """Objects are read and compared all the time, until ``stop``."""
        self._reader.start()

    def stop(self) -> None:
        self._stopped.set()
        self._reader.join(120)
        assert not self._reader.is_alive(), "a client request did not end within its own time-outs"

    def _read(self) -> None:
        client, source = self._make_client(), random.Random(self._seed)
        while not self._stopped.wait(0.05):
            key = source.choice(self.keys)
            for attempt in (1, 2):
                try:
                    self._compare(client, key)
                    self.reads += 1
                    break
                except (BotoCoreError, ClientError, OSError) as error:
                    if isinstance(error, ClientError) and error.response["Error"]["Code"] == "NoSuchKey":
                        self.wrong.append(f"{key}: gone")
                    self.failed_twice += attempt == 2
                    self._stopped.wait(0.3)

    def _compare(self, client: Any, key: str) -> None:
        got = client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        if got != self.body(key):
            self.wrong.append(f"{key}: {len(got)} other bytes")

    def size(self, key: str) -> int:
        number = int(key.rpartition("/")[2])
        for every, size in reversed(LARGE.items()):
            if number % every == every - 1:
                return size
        least, most = CLASSES[number % len(CLASSES)]
        return random.Random(f"{self._seed}/{key}/size").randint(least, most)

    def body(self, key: str) -> bytes:
        return random.Random(f"{self._seed}/{key}").randbytes(self.size(key))

    @property
    def coded(self) -> list[str]:
        """Keys of objects that have fragments."""
        return [key for key in self.keys if self.size(key) > 256 * KIB]

    def write(self) -> None:
        self._for_each(lambda client, key: client.put_object(Bucket=self._bucket, Key=key, Body=self.body(key)))

    def compare(self) -> None:
        """Reads and lists all. What is not as it was written is in ``wrong``."""
        self._for_each(self._compare)
        pages = self._make_client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix="object/")
        listed = {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}
        if listed != {key: self.size(key) for key in self.keys}:
            self.wrong.append(f"list: {len(listed)} keys, or other sizes")

    def _for_each(self, action: Callable[[Any, str], Any]) -> None:
        def work(part: list[str]) -> None:
            client = self._make_client()
            for key in part:
                self._at_last(client, key, action)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, [self.keys[start::4] for start in range(4)]))

    def _at_last(self, client: Any, key: str, action: Callable[[Any, str], Any]) -> None:
        for attempt in range(ATTEMPTS):
            try:
                action(client, key)
                return
            except (BotoCoreError, ClientError, OSError) as error:
                if attempt == ATTEMPTS - 1:
                    self.wrong.append(f"{key}: {error}")
                time.sleep(1)

    def places(self, servers: Servers, *, most: int = 2000) -> Places:
        """Of objects that have fragments; of many, as many as ``most``."""
        return {key: self._places(servers, key) for key in self.coded[:most]}

    def _places(self, servers: Servers, key: str) -> list[tuple[str, int]]:
        rows = servers.where(self._bucket, key)["fragments"]
        blocks = sum({(row["part"], row["block"]): row["blocks"] for row in rows}.values())
        each = self.size(key) / max(blocks, 1)
        return [(row["disk"], int(each * row["blocks"] / _needed(row))) for row in rows]

    def blocks(self, servers: Servers, keys: Iterable[str]) -> list[Block]:
        """What can be read of the blocks of some keys. A key that no gateway can tell about now counts as unreadable,
        so that no fault is played."""
        found: list[Block] = []
        for key in keys:
            rows: list[dict[str, Any]] = []
            with contextlib.suppress(AssertionError):
                rows = servers.where(self._bucket, key)["fragments"]
            if not rows:
                return [Block(1, ())]
            for part, block in {(row["part"], row["block"]) for row in rows}:
                here = [row for row in rows if (row["part"], row["block"]) == (part, block)]
                found.append(Block(_needed(here[0]), tuple(row["disk"] for row in here if row["state"] == "ok")))
        return found


def _needed(row: Mapping[str, Any]) -> int:
    return 1 if row["kind"] == "copies" else int(row["profile"].partition("+")[0])


def movement(before: Places, after: Places) -> Moved:
    moved, shares = 0, Counter[str]()
    for key, fragments in after.items():
        old = {disk for disk, _ in before[key]}
        moved += sum(size for disk, size in fragments if disk not in old)
        for disk, size in fragments:
            shares[disk] += size
        for disk, size in before[key]:
            shares[disk] -= size
    return Moved(moved, sum(size for size in shares.values() if size > 0))
