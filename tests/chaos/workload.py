"""A recorded S3 workload and its judge.

Every worker owns keys of its own and writes numbered contents to them; what was acknowledged is written down before the
next step. A read must then give the newest acknowledged content, or that of a later write whose outcome is unknown (an
error or a broken connection: it may have been applied). A list of a worker's keys must agree in the same way. Anything
else is counted by name:

* lost: the key is not there, though its newest acknowledged write was a put and no delete is in doubt;
* stale: an older content than the newest acknowledged, or a key in a list that was deleted;
* corrupt: bytes, or a size, that no worker wrote.

An error is clean when it is a 503 that asks to come again (``CLEAN``), or when the connection to a process broke or was
refused while that process was killed (``Outages``). Every other error is kept with all that is known of it.

Contents are made from (key, number), so that the judge can make them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    ResponseStreamingError,
)

KIB, MIB = 1024, 1024 * 1024
SIZES = ((0.15, 200), (0.45, 4 * KIB), (0.65, 15 * KIB), (0.8, 150 * KIB), (0.97, 300 * KIB), (1.0, 4 * MIB + 17))
"""(cumulative share, bytes): tiny in the record, small copies, one block, two blocks. Large ones are few: what was
overwritten is deleted an hour later, and a long run fills the disk.
"""

CLEAN = frozenset({"SlowDown", "ServiceUnavailable"})
"""Codes of 503 after which every SDK tries again."""

BROKEN = (EndpointConnectionError, ConnectionClosedError, ResponseStreamingError, HTTPClientError)
"""What a client sees when a gateway's process dies: its connection is refused, closed, or breaks in an answer."""

AFTER_S = 3.0
"""So long after a process was killed and is back, a connection to it may still turn out to be broken."""

NOTED_MAX = 200


def size_of(key: str, number: int) -> int:
    """The size of what ``content_of`` gives, without making it."""
    return len(f"{key} {number}\n".encode()) + _class_of(random.Random(f"{key}/{number}"))


def content_of(key: str, number: int) -> bytes:
    """Deterministic, of a size class that follows from (key, number)."""
    source = random.Random(f"{key}/{number}")
    size = _class_of(source)
    return f"{key} {number}\n".encode() + source.randbytes(size)


def percentile(latencies: Iterable[float], share: float) -> float:
    """In milliseconds; 0 of nothing."""
    found = sorted(latencies)
    return round(1000 * found[min(len(found) - 1, int(share * len(found)))], 1) if found else 0.0


def _class_of(source: random.Random) -> int:
    draw = source.random()
    return next(size for share, size in SIZES if draw <= share)


class Outages:
    """When a process that clients talk to was killed, until it was back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[list[float]] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """The process is away inside the block."""
        span = [time.monotonic(), math.inf]
        with self._lock:
            self._spans.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    def during(self, start: float, end: float) -> bool:
        """Whether there was one between these moments of the monotonic clock."""
        with self._lock:
            return any(first <= end and start <= last + AFTER_S for first, last in self._spans)


@dataclass
class KeyJournal:
    """``acknowledged``: number of the newest acknowledged write (0: none yet, ``deleted`` says whether it was a
    delete); ``doubtful``: later writes with unknown outcome.
    """

    acknowledged: int = 0
    deleted: bool = True
    doubtful: list[tuple[int, bool]] = field(default_factory=list)
    last: int = 0

    def allowed(self) -> list[tuple[int, bool]]:
        """Writes whose result a read may show: (number, whether it is a delete)."""
        return [(self.acknowledged, self.deleted), *self.doubtful]


@dataclass
class Tally:
    """What happened. ``failed`` counts requests that answered an error, ``failed_twice`` those whose first retry failed
    too, ``given_up`` those of which every attempt failed, ``unclean`` those that no client should see; ``noted`` has
    the first of these. ``done``: what was done to the cluster, by name. ``logged``: errors in the nodes' logs.
    """

    acknowledged: int = 0
    reads: int = 0
    lists: int = 0
    failed: int = 0
    unclean: int = 0
    noted: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    logged: Counter[str] = field(default_factory=Counter)
    failed_twice: int = 0
    given_up: int = 0
    lost: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def violations(self) -> list[str]:
        return self.lost + self.stale + self.corrupt

    def summary(self) -> str:
        total = self.acknowledged + self.reads + self.lists + self.failed
        return (
            f"acknowledged writes {self.acknowledged}, verified reads {self.reads}, lists {self.lists}, "
            f"failed {self.failed} of {total} ({100 * self.failed / max(total, 1):.2f}%), failed after one retry "
            f"{self.failed_twice}, not cleanly {self.unclean}; lost {len(self.lost)}, stale {len(self.stale)}, corrupt "
            f"{len(self.corrupt)}; errors {dict(self.errors)}; done {dict(self.done)}"
        )

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class Workload:
    """Threads that put, overwrite, delete and read through clients made by ``client``.

    ``attempts``: how often a request is tried, 2 with one retry. ``think_s``: the pause of a worker between requests.
    ``latencies``: (moment on the monotonic clock, seconds) of each request that worked at its first attempt.
    """

    def __init__(
        self,
        client: Callable[[], Any],
        bucket: str,
        *,
        workers: int = 6,
        keys_each: int = 12,
        seed: int = 1,
        attempts: int = 1,
        think_s: float = 0.0,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._workers = workers
        self._keys_each = keys_each
        self._seed = seed
        self._attempts = attempts
        self._think_s = think_s
        self.outages = Outages()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.journals: dict[str, KeyJournal] = {}
        self.latencies: list[tuple[float, float]] = []
        self.tally = Tally()

    def start(self) -> None:
        for worker in range(self._workers):
            thread = threading.Thread(target=self._work, args=(worker,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client request did not end within its own time-outs"

    def _work(self, worker: int) -> None:
        source = random.Random(f"{self._seed}/{worker}")
        client = self._client()
        keys = [f"w{worker}/k{i:02d}" for i in range(self._keys_each)]
        for key in keys:
            self.journals[key] = KeyJournal()
        while not self._stop.wait(self._think_s):
            key = source.choice(keys)
            draw = source.random()
            if draw < 0.5:
                self._write(client, key, delete=False)
            elif draw < 0.57:
                self._write(client, key, delete=True)
            elif draw < 0.60:
                self._list(client, f"w{worker}/")
            else:
                self._read(client, key)

    def _attempt(self, what: str, action: Callable[[], Any]) -> tuple[bool, Any]:
        """(True, result), or (False, error) after the retry, when there is one, failed too. ``what``: for the notes."""
        failure: Exception | None = None
        for attempt in range(1, self._attempts + 1):
            started = time.monotonic()
            try:
                done = action()
                if attempt == 1:
                    self.latencies.append((started, time.monotonic() - started))
                return True, done
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                name = error.response["Error"].get("Code", str(status))
                if status == 404 and name in ("NoSuchKey", "404"):
                    return True, None
                self._count_failure(what, name, error, started, clean=status == 503 and name in CLEAN)
                failure = error
            except (BotoCoreError, OSError) as error:
                excused = isinstance(error, BROKEN) and self.outages.during(started, time.monotonic())
                self._count_failure(what, type(error).__name__, error, started, clean=excused)
                failure = error
            with self._lock:
                self.tally.failed_twice += attempt == 2
                self.tally.given_up += attempt == self._attempts
            # A gateway that is away refuses thousands of connections a second.
            time.sleep(0.5 if attempt == self._attempts else 0.2 * attempt)
        return False, failure

    def _count_failure(self, what: str, name: str, error: Exception, started: float, *, clean: bool) -> None:
        with self._lock:
            self.tally.failed += 1
            self.tally.errors[name] += 1
            if clean:
                return
            self.tally.unclean += 1
            if len(self.tally.noted) < NOTED_MAX:
                took_s = time.monotonic() - started
                moment = time.strftime("%H:%M:%S")
                self.tally.noted.append(f"{moment} {what}, after {took_s:.2f} s: {name}: {str(error)[:300]}")

    def _write(self, client: Any, key: str, *, delete: bool) -> None:
        journal = self.journals[key]
        journal.last += 1
        number = journal.last
        # Written down as doubtful first: a reader of this journal after a crash must know that it may have been
        # applied.
        journal.doubtful.append((number, delete))
        if delete:
            worked, _ = self._attempt(f"delete {key}", lambda: client.delete_object(Bucket=self._bucket, Key=key))
        else:
            body = content_of(key, number)
            worked, _ = self._attempt(
                f"put {key} of {len(body)} bytes",
                lambda: client.put_object(Bucket=self._bucket, Key=key, Body=body),
            )
        if worked:
            journal.acknowledged, journal.deleted = number, delete
            journal.doubtful = [entry for entry in journal.doubtful if entry[0] > number]
            with self._lock:
                self.tally.acknowledged += 1

    def _read(self, client: Any, key: str) -> None:
        journal = self.journals[key]
        worked, got = self._attempt(
            f"get {key}", lambda: client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        )
        if worked:
            self._judge(key, journal, got)
            with self._lock:
                self.tally.reads += 1

    def _list(self, client: Any, prefix: str) -> None:
        """Lists in pages of a few keys, and judges the whole."""

        def pages() -> dict[str, int]:
            pager = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix, PaginationConfig={"PageSize": 5}
            )
            return {entry["Key"]: entry["Size"] for page in pager for entry in page.get("Contents", ())}

        worked, sizes = self._attempt(f"list {prefix}", pages)
        if not worked:
            return
        if sizes is None:
            self.tally.lost.append(f"list {prefix}: no such bucket")
            return
        self._judge_list(prefix, sizes)
        with self._lock:
            self.tally.lists += 1

    def _judge_list(self, prefix: str, sizes: dict[str, int]) -> None:
        for key in sorted(sizes.keys() - self.journals.keys()):
            self.tally.corrupt.append(f"list {prefix}: {key} was never written")
        for key in sorted(key for key in self.journals if key.startswith(prefix)):
            journal = self.journals[key]
            allowed = journal.allowed()
            if key not in sizes:
                if not any(deleted for _, deleted in allowed):
                    self.tally.lost.append(f"list {prefix}: without {key}, allowed {allowed}")
            elif all(deleted for _, deleted in allowed):
                self.tally.stale.append(f"list {prefix}: {key} was deleted, allowed {allowed}")
            elif sizes[key] not in [size_of(key, number) for number, deleted in allowed if not deleted]:
                known = any(sizes[key] == size_of(key, number) for number in range(1, journal.last + 1))
                (self.tally.stale if known else self.tally.corrupt).append(
                    f"list {prefix}: {key} has {sizes[key]} bytes, allowed {allowed}"
                )

    def _judge(self, key: str, journal: KeyJournal, got: bytes | None) -> None:
        allowed = journal.allowed()
        if got is None:
            if not any(deleted for _, deleted in allowed):
                self.tally.lost.append(f"{key}: gone, acknowledged {journal.acknowledged}")
            return
        for number, deleted in allowed:
            if not deleted and got == content_of(key, number):
                # Once seen it is settled: an older one must never come back.
                journal.acknowledged, journal.deleted = number, False
                journal.doubtful = [entry for entry in journal.doubtful if entry[0] > number]
                return
        digest = hashlib.sha256(got).hexdigest()[:16]
        named = got.split(b"\n", 1)[0][:80]
        for number in range(1, journal.last + 1):
            if got == content_of(key, number):
                self.tally.stale.append(f"{key}: got {number}, acknowledged {journal.acknowledged}, allowed {allowed}")
                return
        self.tally.corrupt.append(f"{key}: {len(got)} bytes {named!r} sha256 {digest}, allowed {allowed}")

    def read_everything(self) -> None:
        """The final word: every key is read and all keys are listed, with patience."""
        client = self._client()
        for key, journal in sorted(self.journals.items()):
            got = self._at_last(key, lambda key=key: self._body(client, key))  # type: ignore[misc]
            if got is not _UNREADABLE:
                self._judge(key, journal, got)
                self.tally.reads += 1
        for worker in range(self._workers):
            self._list(client, f"w{worker}/")

    def _body(self, client: Any, key: str) -> bytes | None:
        try:
            body: bytes = client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return body

    def _at_last(self, key: str, action: Callable[[], Any]) -> Any:
        for attempt in range(10):
            try:
                return action()
            except (BotoCoreError, ClientError, OSError) as error:
                if attempt == 9:
                    self.tally.lost.append(f"{key}: unreadable: {error}")
                time.sleep(1)
        return _UNREADABLE


_UNREADABLE = object()
