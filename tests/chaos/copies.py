"""Clients that rename buckets, as S3 lets them: they copy all objects to a new bucket, delete the originals, remove the
old bucket, and use its name again. Some copies go to a bucket that stays. Nodes are killed meanwhile.

Every object is compared after each step. What a client was told is there has to be there: its data belongs to a bucket
that may not exist any more.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from tests.chaos import control
from tests.chaos.workload import Workload
from tests.cluster import Cluster

KIB = 1024
SIZES = (300 * KIB, 700 * KIB, 2500 * KIB)
"""Coded objects. Smaller ones are copied with their data."""
OBJECTS = 4
KEPT_MAX = 12
PATIENCE_S = 120.0
"""So long a client tries again, while nodes are killed."""


class GivenUp(Exception):
    """A request did not work in all its time."""


class Renames:
    """One client, with a chain of two bucket names that take turns, and one bucket whose copies stay."""

    def __init__(self, client: Any, name: str, seed: int, stop: Callable[[], bool]) -> None:
        self._client = client
        self._chance = random.Random(f"{seed}/{name}")
        self._names = [f"{name}-0", f"{name}-1"]
        self._stays = f"{name}-stays"
        self._stop = stop
        self._objects: dict[str, bytes] = {}
        """Of the bucket that is in use."""
        self._kept: dict[str, bytes] = {}
        self._made = 0
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        try:
            self._try("create", lambda: self._create(self._stays))
            self._try("create", lambda: self._create(self._names[0]))
            while not self._stop():
                self._rename()
            self.judge()
        except GivenUp as error:
            self.wrong.append(str(error))

    def _rename(self) -> None:
        old, new = self._names
        while len(self._objects) < OBJECTS:
            self._made += 1
            key, size = f"object {self._made}", self._chance.choice(SIZES)
            body = random.Random(f"{old}/{key}").randbytes(size)
            self._try("put", lambda key=key, body=body: self._client.put_object(Bucket=old, Key=key, Body=body))  # type: ignore[misc]
            self._objects[key] = body
        self._try("create", lambda: self._create(new))
        for key in sorted(self._objects):
            self._copy(old, key, new, key)
            if self._chance.random() < 0.3 and len(self._kept) < KEPT_MAX:
                kept = f"{self._made}/{key}"
                self._copy(old, key, self._stays, kept)
                self._kept[kept] = self._objects[key]
        for key in sorted(self._objects):
            self._try("delete", lambda key=key: self._client.delete_object(Bucket=old, Key=key))  # type: ignore[misc]
        self._try("delete bucket", lambda: self._delete_bucket(old))
        self._names = [new, old]
        self._check(new, self._objects)
        gone = self._chance.choice(sorted(self._objects))
        self._try("delete", lambda: self._client.delete_object(Bucket=new, Key=gone))
        del self._objects[gone]
        if self._kept and self._chance.random() < 0.3:
            kept = self._chance.choice(sorted(self._kept))
            self._try("delete", lambda: self._client.delete_object(Bucket=self._stays, Key=kept))
            del self._kept[kept]

    def judge(self) -> None:
        """Reads and lists everything."""
        for bucket, objects in ((self._names[0], self._objects), (self._stays, self._kept)):
            self._check(bucket, objects)
            listed = self._try("list", lambda bucket=bucket: self._client.list_objects_v2(Bucket=bucket))  # type: ignore[misc]
            keys = {entry["Key"] for entry in listed.get("Contents", ())}
            if keys != objects.keys():
                self.wrong.append(f"list {bucket}: {sorted(keys)}, written {sorted(objects)}")

    def _check(self, bucket: str, objects: dict[str, bytes]) -> None:
        for key, body in objects.items():
            got = self._try("get", lambda key=key: self._client.get_object(Bucket=bucket, Key=key)["Body"].read())  # type: ignore[misc]
            if got != body:
                self.wrong.append(f"{bucket}/{key}: other bytes")

    def _copy(self, bucket: str, key: str, to: str, as_key: str) -> None:
        source = {"Bucket": bucket, "Key": key}
        self._try("copy", lambda: self._client.copy_object(Bucket=to, Key=as_key, CopySource=source))

    def _create(self, bucket: str) -> None:
        try:
            self._client.create_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
                raise

    def _delete_bucket(self, bucket: str) -> None:
        """A request before this one may have deleted it although it failed."""
        try:
            self._client.delete_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchBucket":
                raise

    def _try(self, what: str, action: Callable[[], Any]) -> Any:
        """What is missing, or not empty, is never excused: nobody else uses these buckets."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                found = action()
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status < 500:
                    self.wrong.append(f"{what}: {error}")
                failure: Exception = error
            except (BotoCoreError, OSError) as error:
                failure = error
            else:
                self.done[what] += 1
                return found
            self.done[f"{what} failed"] += 1
            if time.monotonic() > until:
                raise GivenUp(f"{what}: {failure}")
            time.sleep(0.3)


def rename_buckets(
    cluster: Cluster,
    seconds: float,
    *,
    clients: int = 3,
    seed: int = 1,
    kills: Callable[[Cluster, Workload, random.Random], None] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[str], Counter[str]]:
    """``kills``: is called again and again. Returns what was wrong, and what was done."""
    end = time.monotonic() + seconds
    work = [
        Renames(cluster.boto3(read_timeout_s=60), f"house-{seed}-{one}", seed, lambda: time.monotonic() > end)
        for one in range(clients)
    ]
    threads = [threading.Thread(target=one.run, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    source, idle = random.Random(seed), Workload(cluster.boto3, "none")
    while kills is not None and time.monotonic() < end:
        time.sleep(source.uniform(0.5, 3))
        kills(cluster, idle, source)
        cluster.wait_until(lambda: control.all_up(cluster), 60, "all to be back")
    for thread in threads:
        thread.join(2 * PATIENCE_S + seconds)
        assert not thread.is_alive(), "a client did not end"
    cluster.wait_until(lambda: control.status(cluster)["verdict"] == "HEALTHY", 240, "HEALTHY")
    for one in work:
        one.judge()
    done = sum((one.done for one in work), Counter[str]())
    wrong = [line for one in work for line in one.wrong]
    say(f"{len(wrong)} wrong; done {dict(done)}, kills {dict(idle.tally.done)}")
    return wrong, done
