"""Long work: its progress, rate and estimated end, and a pace that leaves the disks to clients' requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from storaged.clock import Clock
from storaged.units import format_size
from storaged.wire import Message


class JobReport(Message, frozen=True):
    """One job as ``status`` shows it. ``state``: running, waiting, done, failed. ``total``: units, 0 while it is not
    known. ``rate``: text for a person.
    """

    name: str
    node: str
    state: str
    done: int
    total: int
    rate: str
    eta_s: float | None
    detail: str = ""


@dataclass
class Job:
    """Counts units of work (fragments, rows, objects) and, where it moves data, bytes."""

    name: str
    clock: Clock
    state: str = "waiting"
    done: int = 0
    total: int = 0
    bytes: int = 0
    started: float = 0.0
    ended: float = 0.0
    detail: str = ""

    def start(self, total: int = 0) -> None:
        self.state, self.done, self.bytes, self.total, self.detail = "running", 0, 0, total, ""
        self.started = self.ended = self.clock.monotonic()

    def advance(self, units: int = 1, moved_bytes: int = 0) -> None:
        self.done += units
        self.bytes += moved_bytes

    def finish(self, state: str = "done", detail: str = "") -> None:
        self.state, self.detail, self.ended = state, detail, self.clock.monotonic()

    def report(self, node: str) -> JobReport:
        elapsed = (self.clock.monotonic() if self.state == "running" else self.ended) - self.started
        speed = self.done / elapsed if elapsed > 0 else 0.0
        rate = (
            f"{format_size(int(self.bytes / elapsed))}/s"
            if self.bytes and elapsed > 0
            else f"{speed:.0f}/s"
            if speed
            else ""
        )
        left = self.total - self.done
        eta = left / speed if self.state == "running" and speed and left > 0 else None
        return JobReport(self.name, node, self.state, self.done, self.total, rate, eta, self.detail)


class Pace:
    """At most ``bytes_per_s`` on average, with bursts of one second. 0: no bound."""

    def __init__(self, clock: Clock, bytes_per_s: int) -> None:
        self._clock = clock
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def spend(self, count: int) -> None:
        """Waits until ``count`` more bytes are within the pace. Gives others a turn in any case."""
        if not self.bytes_per_s:
            await asyncio.sleep(0)
            return
        now = self._clock.monotonic()
        self._free_at = max(self._free_at, now - 1.0) + count / self.bytes_per_s
        await asyncio.sleep(max(self._free_at - now, 0.0))
