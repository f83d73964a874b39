"""What the admin API is given by the composition root. A storage node has the first part only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from storaged.objects.api import Buckets, Users


class JobStatus(NamedTuple):
    """One long piece of work. ``percent`` None: its size is not known yet; ``eta_s`` None: no rate yet. ``state``: running, waiting, paused, done, failed."""

    name: str
    state: str
    percent: float | None
    rate: str
    eta_s: float | None
    detail: str = ""


class Jobs(Protocol):
    """Repair, scrub and other long work (``maintain.runner``)."""

    def jobs(self) -> Sequence[JobStatus]: ...

    async def start_scrub(self) -> None:
        """Begins reading and verifying everything; does nothing when one is running."""


@dataclass
class Services:
    """``status`` is the document of ``storaged status`` (a storage node tells of itself). ``ready`` says whether this node can do its work, and why not."""

    status: Callable[[], Awaitable[dict[str, Any]]]
    ready: Callable[[], tuple[bool, str]]
    doctor: Callable[[], Awaitable[list[dict[str, str]]]]
    users: Users | None = None
    buckets: Buckets | None = None
    region: str = ""
    where: Callable[[str, bytes], Awaitable[dict[str, Any]]] | None = None
    jobs: Jobs | None = None
    key_backup: Callable[[str], Awaitable[tuple[str, bytes]]] | None = None
    """passphrase -> the keyring's id and its backup, sealed under the passphrase."""
