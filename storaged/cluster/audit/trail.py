"""Where audit entries go, for the code that writes them; an operation is audited as two entries (``audited``)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

import structlog

from storaged.cluster.audit.format import DONE, FAILED, INTENT, REFUSED
from storaged.errors import AuditUnwritable, StoragedError
from storaged.ids import system_entropy

log = structlog.get_logger(__name__)

OPERATION_BYTES = 8


class Trail(Protocol):
    """Takes entries: ``audit.log.AuditLog``, or in a gateway's further process ``node.leader.Leader``.

    ``actor``, ``target`` and ``outcome``: see ``audit.format.Event``; the default ``actor`` is this node. ``fields``
    are text, numbers, booleans, None, and lists and mappings of these; no keys, no secrets, no content.
    """

    async def append(
        self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any
    ) -> None:
        """Returns when the entry is on disk.

        Raises AuditUnwritable; ValueError or TypeError for fields that are too large or not JSON (then nothing is
        written).
        """

    def note(self, kind: str, /, *, actor: str = "", target: str = "", outcome: str = "", **fields: Any) -> None:
        """Writes soon, for events that nothing waits for and that no stranger can cause.

        When the queue is full, the entry is dropped and counted.
        """

    def refused(self, kind: str, code: str, /, *, actor: str, target: str = "", **fields: Any) -> None:
        """Notes that something was refused before anything was done.

        The first refusal of a kind and code is an entry; one more entry counts those of the next minute.
        """


@contextlib.asynccontextmanager
async def audited(
    trail: Trail, kind: str, /, *, actor: str, target: str, **fields: Any
) -> AsyncIterator[dict[str, Any]]:
    """Puts the intent on disk before the block begins, and the outcome before the block is left.

    What the block puts into the mapping goes into the outcome's entry. Raises AuditUnwritable before the block only: an
    outcome that can't be written does not undo what was done (it is logged, and the intent stays).
    """
    operation = system_entropy(OPERATION_BYTES).hex()
    await trail.append(kind, actor=actor, target=target, outcome=INTENT, operation=operation, **fields)
    found: dict[str, Any] = {}
    try:
        yield found
    except BaseException as error:
        trail.note(kind, actor=actor, target=target, outcome=outcome_of(error), operation=operation, **found)
        raise
    try:
        await trail.append(kind, actor=actor, target=target, outcome=DONE, operation=operation, **found)
    except (AuditUnwritable, ValueError, TypeError) as error:
        log.error(
            "the outcome of what was done could not be audited", kind=kind, operation=operation, reason=str(error)
        )


def outcome_of(error: BaseException) -> str:
    """The outcome of an operation that ended with ``error``. A refusal by rule (4xx, or an operator's error) changed
    nothing.
    """
    if not isinstance(error, StoragedError):
        return f"{FAILED} {'InternalError' if isinstance(error, Exception) else 'CANCELLED'}"
    return f"{REFUSED if error.status < 500 else FAILED} {error.code}"
