"""What the owner of a disk gives its fragment store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from storaged.clock import Clock, SystemClock
from storaged.disk_health import DiskHealth
from storaged.fragments.ports import FragmentId

T = TypeVar("T")

OnDamage = Callable[[FragmentId, int], None]
"""``on_damage(fragment, cell)``; cell -1 is the head, so all cells."""


class InThread(Protocol):
    """Runs blocking work outside of the event loop, like ``asyncio.to_thread``."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


@dataclass(frozen=True)
class DiskOwner:
    """What the owner of a disk gives its fragment store.

    ``on_damage`` runs on the event loop, once for every cell newly found bad.
    ``failed_before``: why the disk failed for good, as the owner has noted; it is read-only then.
    ``note_failed(reason)``: called in a thread when the disk fails for good; returns whether the owner noted it.
    ``in_thread(work)`` runs the start, which blocks.
    ``health``: of the disk; the other stores on it share it.
    """

    clock: Clock = field(default_factory=SystemClock)
    on_damage: OnDamage | None = None
    failed_before: str = ""
    note_failed: Callable[[str], bool] = lambda _reason: False
    in_thread: InThread = asyncio.to_thread
    health: DiskHealth = field(default_factory=DiskHealth)
