"""A recorded S3 workload and its judge.

Every worker owns keys of its own and writes numbered contents to them; what was acknowledged is written down before the
next step. A read must then give the
newest acknowledged content, or that of a later write whose outcome is unknown (an error or a broken connection: it may
have been applied). Anything else
is counted by name:

* lost: the key is not there, though its newest acknowledged write was a put and no delete is in doubt;
* stale: an older content than the newest acknowledged;
* corrupt: bytes that nobody wrote.

Contents are made from (key, number), so that the judge can make them again.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

KIB, MIB = 1024, 1024 * 1024
SIZES = ((0.15, 200), (0.45, 4 * KIB), (0.65, 15 * KIB), (0.90, 150 * KIB), (1.0, 4 * MIB + 17))
"""(cumulative share, bytes): tiny in the record, small copies, one block, two blocks."""


def content_of(key: str, number: int) -> bytes:
    """Deterministic, of a size class that follows from (key, number)."""
    source = random.Random(f"{key}/{number}")
    draw = source.random()
    size = next(size for share, size in SIZES if draw <= share)
    return f"{key} {number}\n".encode() + source.randbytes(size)


@dataclass
class KeyJournal:
    """``acknowledged``: number of the newest acknowledged write (0: none yet, ``deleted`` says whether it was a
    delete); ``doubtful``: later writes with unknown outcome.
    """

    acknowledged: int = 0
    deleted: bool = True
    doubtful: list[tuple[int, bool]] = field(default_factory=list)
    last: int = 0


@dataclass
class Tally:
    """What happened. ``failed`` counts requests that answered an error, ``failed_twice`` those whose one retry failed
    too.
    """

    acknowledged: int = 0
    reads: int = 0
    failed: int = 0
    failed_twice: int = 0
    lost: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def violations(self) -> list[str]:
        return self.lost + self.stale + self.corrupt

    def summary(self) -> str:
        total = self.acknowledged + self.reads + self.failed
        return (
            f"acknowledged writes {self.acknowledged}, verified reads {self.reads}, failed {self.failed} of {total} "
            f"({100 * self.failed / max(total, 1):.2f}%), failed after one retry {self.failed_twice}; "
            f"lost {len(self.lost)}, stale {len(self.stale)}, corrupt {len(self.corrupt)}; errors {dict(self.errors)}"
        )


class Workload:
    """Threads that put, overwrite, delete and read through clients made by ``client``; ``retry`` tries a failed request
    once more.
    """

    def __init__(
        self,
        client: Callable[[], Any],
        bucket: str,
        *,
        workers: int = 6,
        keys_each: int = 12,
        seed: int = 1,
        retry: bool = False,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._workers = workers
        self._keys_each = keys_each
        self._seed = seed
        self._retry = retry
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.journals: dict[str, KeyJournal] = {}
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
        while not self._stop.is_set():
            key = source.choice(keys)
            draw = source.random()
            if draw < 0.5:
                self._write(client, key, delete=False)
            elif draw < 0.57:
                self._write(client, key, delete=True)
            else:
                self._read(client, key)

    def _attempt(self, action: Callable[[], Any]) -> tuple[bool, Any]:
        """(True, result), or (False, error) after the retry, when there is one, failed too."""
        for attempt in (1, 2):
            try:
                return True, action()
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 404:
                    return True, None
                self._count_failure(error.response["Error"].get("Code", str(status)))
                failure: Exception = error
            except (BotoCoreError, OSError) as error:
                self._count_failure(type(error).__name__)
                failure = error
            if not self._retry or attempt == 2:
                with self._lock:
                    self.tally.failed_twice += self._retry
                time.sleep(0.05)
                return False, failure
            time.sleep(0.2)
        raise AssertionError("not reached")

    def _count_failure(self, name: str) -> None:
        with self._lock:
            self.tally.failed += 1
            self.tally.errors[name] += 1

    def _write(self, client: Any, key: str, *, delete: bool) -> None:
        journal = self.journals[key]
        journal.last += 1
        number = journal.last
        # Written down as doubtful first: a reader of this journal after a crash must know that it may have been
        # applied.
        journal.doubtful.append((number, delete))
        if delete:
            worked, _ = self._attempt(lambda: client.delete_object(Bucket=self._bucket, Key=key))
        else:
            body = content_of(key, number)
            worked, _ = self._attempt(lambda: client.put_object(Bucket=self._bucket, Key=key, Body=body))
        if worked:
            journal.acknowledged, journal.deleted = number, delete
            journal.doubtful = [entry for entry in journal.doubtful if entry[0] > number]
            with self._lock:
                self.tally.acknowledged += 1

    def _read(self, client: Any, key: str) -> None:
        journal = self.journals[key]
        worked, got = self._attempt(lambda: client.get_object(Bucket=self._bucket, Key=key)["Body"].read())
        if worked:
            self._judge(key, journal, got)
            with self._lock:
                self.tally.reads += 1

    def _judge(self, key: str, journal: KeyJournal, got: bytes | None) -> None:
        allowed = [(journal.acknowledged, journal.deleted), *journal.doubtful]
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
        """The final word: every key, with patience."""
        client = self._client()
        for key, journal in sorted(self.journals.items()):
            for attempt in range(10):
                try:
                    got = client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
                except ClientError as error:
                    if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                        got = None
                    elif attempt == 9:
                        self.tally.lost.append(f"{key}: unreadable: {error}")
                        break
                    else:
                        time.sleep(1)
                        continue
                except (BotoCoreError, OSError) as error:
                    if attempt == 9:
                        self.tally.lost.append(f"{key}: unreadable: {error}")
                        break
                    time.sleep(1)
                    continue
                self._judge(key, journal, got)
                self.tally.reads += 1
                break
