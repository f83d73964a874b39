"""Counters that several clients increment through all gateways with If-Match: a split register shows as an increment
that is lost, though it was acknowledged to two clients.

The keys lie in as many partitions as a bucket has shards, or nearly. An increment with an error may have been applied,
so a counter ends between the acknowledged increments and these plus the unknown ones. A value never falls: a read
returns at least what was acknowledged before it began.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

KEYS = 32
REFUSED = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
"""Codes of an increment that was not applied: another client was faster."""


class Counters:
    """``clients`` threads, with pauses of ``think_s``; ``make_client`` makes the client of each of them."""

    def __init__(
        self, make_client: Callable[[], Any], bucket: str, *, clients: int = 3, seed: int = 1, think_s: float = 0.02
    ) -> None:
        self._make_client = make_client
        self._bucket = bucket
        self._clients = clients
        self._seed = seed
        self._think_s = think_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.keys = [f"counter/{number:02d}" for number in range(KEYS)]
        self.acknowledged: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._seen: dict[str, int] = {}
        """The highest value that a client was given."""
        self.conflicts = 0
        self.wrong: list[str] = []

    def start(self) -> None:
        client = self._make_client()
        for key in self.keys:
            client.put_object(Bucket=self._bucket, Key=key, Body=b"0 first 0")
        for number in range(self._clients):
            thread = threading.Thread(target=self._work, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client request did not end within its own time-outs"

    def _work(self, number: int) -> None:
        source = random.Random(f"{self._seed}/counter/{number}")
        client = self._make_client()
        for serial in itertools.count():
            if self._stopped.wait(self._think_s):
                return
            self._increment(client, source.choice(self.keys), f"{number} {serial}")

    def _increment(self, client: Any, key: str, unique: str) -> None:
        """``unique`` makes the content, and so the ETag, one that no other increment has."""
        before = self._seen.get(key, 0)
        try:
            value, etag = self._read(client, key)
        except (BotoCoreError, ClientError, OSError) as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] == "NoSuchKey":
                self.wrong.append(f"{key}: gone, at least {before} was acknowledged")
            self._stopped.wait(0.3)
            return
        if value < before:
            self.wrong.append(f"{key}: {value} was read after {before}")
        try:
            client.put_object(Bucket=self._bucket, Key=key, Body=f"{value + 1} {unique}".encode(), IfMatch=etag)
        except (BotoCoreError, ClientError, OSError) as error:
            with self._lock:
                if isinstance(error, ClientError) and error.response["Error"]["Code"] in REFUSED:
                    self.conflicts += 1
                else:
                    self.unknown[key] += 1
            self._stopped.wait(0.1)
            return
        with self._lock:
            self.acknowledged[key] += 1
            self._seen[key] = max(self._seen.get(key, 0), value + 1)

    def _read(self, client: Any, key: str) -> tuple[int, str]:
        found = client.get_object(Bucket=self._bucket, Key=key)
        return int(found["Body"].read().split()[0]), found["ETag"]

    def judge(self) -> None:
        """After ``stop``, of a cluster that answers."""
        client = self._make_client()
        for key in self.keys:
            value, _ = self._read(client, key)
            least = self.acknowledged[key]
            most = least + self.unknown[key]
            if not least <= value <= most:
                self.wrong.append(f"{key}: {value}, and {least} to {most} were acknowledged or are unknown")

    def document(self) -> dict[str, Any]:
        return {
            "increments": self.acknowledged.total(),
            "unknown": self.unknown.total(),
            "conflicts": self.conflicts,
            "wrong": self.wrong,
        }
