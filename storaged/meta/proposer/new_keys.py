"""Whether a register was probably never written: then a change of it is tried as a create (``consensus.register``).

A create that is taken spares a round trip. One that is refused was for nothing, so creates are tried only in buckets
where the latest changes found nothing.
"""

from __future__ import annotations

from storaged.meta.names import RegisterName

NEW_AT_LEAST = 0.75
"""Creates are tried if at least this share of the latest changes in the bucket met a new key: a refused create costs
more than twice what a taken one saves, and one of a coded object three times: its fragments are touched.
"""

NEW_OF_LATE = 16
"""How many changes the rate remembers, about."""

SCOPES_MAX = 1_024


class NewKeyRate:
    """How many of the latest changes of each bucket's registers found nothing."""

    def __init__(self) -> None:
        self._rates: dict[bytes, float] = {}

    def likely(self, name: RegisterName) -> bool:
        """Whether the register was probably never written."""
        return self._rates.get(name.scope, 1.0) >= NEW_AT_LEAST

    def saw(self, name: RegisterName, new: bool) -> None:
        rates, scope = self._rates, name.scope
        rate = rates.get(scope, 1.0)
        if rate == new:
            return  # as it was all the time
        if len(rates) >= SCOPES_MAX and scope not in rates:
            rates.clear()
        rates[scope] = rate + (new - rate) / NEW_OF_LATE
