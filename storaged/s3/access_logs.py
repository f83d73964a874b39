"""Access logs of buckets: collected in memory, and put into their target buckets now and then.

Theory of operation. Delivery is best effort, as on AWS: a line may come late, twice or never. After each answer
``note`` adds a line to the lines of its bucket, and returns at once. A task puts them into the target as objects, in
the ordinary way, every ``interval_s`` seconds, or sooner when half of the room is taken. It asks for permission as the
service that AWS names, each time.

Memory is bounded: ``bytes_max`` for all lines, those on their way included, and a quarter of that for one bucket, so
that a target that can't be written takes no room from others. A line without room is dropped and counted. Lines whose
target refuses them, or that can't be written within an hour, are dropped and counted too. What a process has when it is
killed is lost; one that ends in order delivers first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from storaged.errors import AccessDenied, NoSuchBucket, S3Error, StoragedError
from storaged.ids import Entropy
from storaged.objects.configuration.logging import LOGGING, BucketLogging
from storaged.objects.records import BucketRecord
from storaged.s3.authorization import log_grant
from storaged.s3.context import Front, existing_bucket
from storaged.s3.delivery import deliver
from storaged.s3.log_lines import Spoken, day_of, key_of, lines_of
from storaged.s3.request import RequestDone
from storaged.units import MIB

OBJECT_BYTES_MAX: Final = 4 * MIB
"""Of one log object."""
RETRIED_MS: Final = 3_600_000
PUT_TIMEOUT_S: Final = 60.0
CLOSING_S: Final = 5.0
"""What a process that ends may take for the last delivery."""
TYPE: Final = "text/plain"

log = logging.getLogger("storaged.s3.access_logs")


class Stream(NamedTuple):
    """The lines of one object: of a bucket, by name and id, and of one day."""

    bucket: str
    bucket_id: bytes
    day: int


@dataclass(slots=True)
class Lines:
    since_ms: int
    """Of the oldest line."""
    lines: deque[bytes] = field(default_factory=deque)
    size: int = 0
    """In bytes."""

    def take(self, bytes_max: int) -> list[bytes]:
        """The oldest lines; at least one."""
        taken = [self.lines.popleft()]
        size = len(taken[0])
        while self.lines and size + len(self.lines[0]) <= bytes_max:
            size += len(self.lines[0])
            taken.append(self.lines.popleft())
        self.size -= size
        return taken

    def put_back(self, taken: list[bytes]) -> None:
        self.lines.extendleft(reversed(taken))
        self.size += sum(map(len, taken))


@dataclass
class Counts:
    """Since the start. ``dropped``: no room. ``refused``: the target refused, or the bucket has no log any more."""

    lines: int = 0
    delivered: int = 0
    dropped: int = 0
    refused: int = 0
    objects: int = 0


class AccessLogs:
    """The access logs of one process."""

    def __init__(self, front: Front, entropy: Entropy) -> None:
        self._front = front
        self._entropy = entropy
        self._settings = front.endpoint.access_logs
        self._streams: dict[Stream, Lines] = {}
        self._held: dict[bytes, int] = {}
        """Bucket id -> bytes of its lines, those on their way included."""
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.held_bytes = 0
        """Of all."""
        self.counts = Counts()

    # --- after each answer

    def wants(self, bucket: BucketRecord) -> bool:
        """Whether the requests of a bucket, which is not plain, have a log."""
        try:
            return self._front.buckets.configuration_of(bucket).get(LOGGING) is not None
        except StoragedError:
            return False

    def note(self, done: RequestDone, bucket: BucketRecord, spoken: Spoken) -> None:
        """Adds the lines of a request."""
        now_ms = self._front.clock.wall_ms()
        began_ms = now_ms - int(done.duration_s * 1000)
        stream = Stream(bucket.name, bucket.id, day_of(began_ms))
        for line in lines_of(done, bucket, began_ms, spoken):
            self._add(stream, line.encode("utf-8", "replace"), now_ms)

    def _add(self, stream: Stream, line: bytes, now_ms: int) -> None:
        held, whole = self._held.get(stream.bucket_id, 0), self.held_bytes
        self.counts.lines += 1
        if whole + len(line) > self._settings.bytes_max or held + len(line) > self._settings.bytes_max // 4:
            self.counts.dropped += 1
            return
        lines = self._streams.get(stream)
        if lines is None:
            lines = self._streams[stream] = Lines(now_ms)
        lines.lines.append(line)
        lines.size += len(line)
        self._held[stream.bucket_id] = held + len(line)
        self.held_bytes += len(line)
        if held + len(line) > self._settings.bytes_max // 8 or whole + len(line) > self._settings.bytes_max // 2:
            self._full.set()

    # --- delivery

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="access logs")

    async def close(self) -> None:
        """Delivers what is left, within bounds. Safe to call twice."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSING_S):
                await self.deliver()
        except TimeoutError:
            log.warning("lines of access logs are lost: they could not be delivered at the end")

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings.interval_s):
                    await self._full.wait()
            except TimeoutError:
                pass
            self._full.clear()
            await self.deliver()
            # full again at once: the targets take nothing, and a loop without a pause would not change that
            await asyncio.sleep(min(1.0, self._settings.interval_s))

    async def deliver(self) -> None:
        """Puts all lines that are there now. Raises nothing but for cancellation."""
        for stream in tuple(self._streams):
            lines = self._streams.pop(stream)
            while lines.lines:
                taken = lines.take(OBJECT_BYTES_MAX)
                try:
                    delivered = await self._deliver(stream, taken)
                except asyncio.CancelledError:
                    lines.put_back(taken)
                    self._return(stream, lines)
                    raise
                if delivered is None and self._front.clock.wall_ms() - lines.since_ms <= RETRIED_MS:
                    lines.put_back(taken)
                    self._return(stream, lines)
                    break
                self._let_go(stream, taken, delivered is True)

    def _return(self, stream: Stream, lines: Lines) -> None:
        """Lines for the next round, before those that came meanwhile."""
        newer = self._streams.get(stream)
        if newer is not None:
            lines.lines.extend(newer.lines)
            lines.size += newer.size
        self._streams[stream] = lines

    def _let_go(self, stream: Stream, taken: list[bytes], delivered: bool) -> None:
        size = sum(map(len, taken))
        self.held_bytes -= size
        left = self._held.get(stream.bucket_id, 0) - size
        if left > 0:
            self._held[stream.bucket_id] = left
        else:
            self._held.pop(stream.bucket_id, None)
        if delivered:
            self.counts.delivered += len(taken)
            self.counts.objects += 1
        else:
            self.counts.refused += len(taken)

    async def _deliver(self, stream: Stream, taken: list[bytes]) -> bool | None:
        """True: they are stored. False: nobody wants them, or the target refuses. None: not now."""
        try:
            async with asyncio.timeout(PUT_TIMEOUT_S):
                source = await existing_bucket(self._front, stream.bucket)
                setting = self._front.buckets.configuration_of(source).get(LOGGING)
                if source.id != stream.bucket_id or setting is None:
                    return False
                await self._put(source, setting, stream.day, taken)
        except (AccessDenied, NoSuchBucket) as error:
            log.info("the access log of the bucket %s can't be delivered: %s", stream.bucket, error.message)
            return False
        except (StoragedError, TimeoutError) as error:
            log.info("the access log of the bucket %s waits: %s", stream.bucket, error)
            return False if isinstance(error, S3Error) and error.status < 500 else None
        except Exception:
            log.exception("the access log of the bucket %s can't be delivered", stream.bucket)
            return False
        return True

    async def _put(self, source: BucketRecord, setting: BucketLogging, day: int, taken: list[bytes]) -> None:
        """Raises as ``log_grant`` and ``deliver``, and NoSuchBucket."""
        front, now_ms = self._front, self._front.clock.wall_ms()
        target = await existing_bucket(front, setting.target)
        if target.owner != source.owner:
            raise AccessDenied("The target bucket of the log belongs to another user.")
        unique = self._entropy(8).hex().upper()
        key = key_of(setting, source, front.endpoint.region, day, now_ms, unique)
        await deliver(front, log_grant(front, source, target, key), key, b"".join(taken), TYPE, unique)
