"""Counts refusals, so that a million attempts of a stranger do not fill the disk of the audit log. No I/O; time is an
argument.

The first refusal of a kind and code becomes an entry at once. Those of the following minute are counted, and one entry
at its end reports them (``repeated``, the actors, the last target). So each (kind, code) costs at most two entries a
minute, whatever strangers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from storaged.cluster.audit.format import REFUSED, Event

QUIET_MS: Final = 60_000
CODES_MAX: Final = 256
"""(kind, code) pairs at once; further ones are counted together. Both come from tables of this program, so only a
defect reaches this limit."""

ACTORS_MAX: Final = 16
"""Actors that an entry names with their counts; the rest are counted as ``others``."""

TEXT_CHARS_MAX: Final = 512
"""The length of each text of a refusal, which a stranger may have chosen."""

_OVERFLOW = ("refused.other", "OTHER")


@dataclass
class _Counted:
    since_ms: int
    target: str = ""
    repeated: int = 0
    others: int = 0
    actors: Counter[str] = field(default_factory=Counter)


class Refusals:
    """Call ``add`` for each refusal, and ``due`` now and then; both return the events to write."""

    def __init__(self) -> None:
        self._counted: dict[tuple[str, str], _Counted] = {}

    @property
    def waiting(self) -> bool:
        """Whether something was counted, or became an entry less than a minute ago."""
        return bool(self._counted)

    def add(
        self, now_ms: int, kind: str, code: str, actor: str, target: str, fields: Mapping[str, Any]
    ) -> Event | None:
        """Returns the event to write; None when the refusal was counted."""
        name = (kind, code)
        actor, target = _cut(actor), _cut(target)
        if name not in self._counted and len(self._counted) >= CODES_MAX:
            name = _OVERFLOW
        counted = self._counted.get(name)
        if counted is None:
            self._counted[name] = _Counted(now_ms)
            cut = {key: _cut(value) if isinstance(value, str) else value for key, value in fields.items()}
            return Event(kind, actor, target, f"{REFUSED} {code}", cut)
        counted.repeated += 1
        counted.target = target
        if actor in counted.actors or len(counted.actors) < ACTORS_MAX:
            counted.actors[actor] += 1
        else:
            counted.others += 1
        return None

    def due(self, now_ms: int, *, all_of_them: bool = False) -> list[Event]:
        """The events for what was counted over a minute (with ``all_of_them``: until now). A clock that went back ends
        the minute early.
        """
        found = []
        for name, counted in list(self._counted.items()):
            if not all_of_them and 0 <= now_ms - counted.since_ms < QUIET_MS:
                continue
            if not counted.repeated:
                del self._counted[name]
                continue
            (kind, code), actors = name, counted.actors
            fields: dict[str, Any] = {"repeated": counted.repeated, "actors": dict(actors.most_common())}
            if counted.others:
                fields["others"] = counted.others
            actor = next(iter(actors)) if len(actors) == 1 and not counted.others else ""
            found.append(Event(kind, actor, counted.target, f"{REFUSED} {code}", fields))
            self._counted[name] = _Counted(now_ms)
        return found


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARS_MAX else text[:TEXT_CHARS_MAX] + "..."
