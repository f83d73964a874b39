"""How an attempt of a change ends: with an outcome, an error, or another attempt. Pure; ``proposer`` is the machine."""

from __future__ import annotations

from storaged.errors import CopyUnreadable, NoSuchBucket, OutcomeUnknown, ServiceUnavailable
from storaged.meta.consensus.change import BACKOFF_FIRST_S, BACKOFF_MAX_S, Shared
from storaged.meta.consensus.register import Lineage
from storaged.meta.consensus.rounds import AcceptRound, Found, Rivals
from storaged.meta.consensus.states import (
    ACCEPTING,
    CARRYING,
    DONE,
    FAILED,
    GATHERING,
    NEW,
    PREPARING,
    REFRESHING,
    RETRYING,
    SYNCING,
    State,
)
from storaged.meta.names import RegisterName
from storaged.meta.ports import Outcome


class Ending:
    """The base of ``Proposer``: what all its ends need."""

    # fmt: off
    __slots__ = (
        "_accepts", "_attempts", "_conclusion", "_looked", "_rivals", "_shared", "_stale", "_third_replica_tries",
        "_tries", "_unreached",
        "error", "fenced", "lineage", "outcome", "pause_s", "sparing", "state", "turn",
    )
    # fmt: on

    name: RegisterName
    _accepts: AcceptRound
    _conclusion: Outcome | Exception | None

    def __init__(self, shared: Shared, lineage: Lineage) -> None:
        self._shared = shared
        self._rivals = Rivals(shared.rules)
        self.lineage = lineage
        self.state: State = NEW
        self.turn = 0
        """Counts the requests that were sent to several disks: answers name the one that they belong to."""
        self.sparing = self.fenced = False
        """``fenced``: it failed because a quorum is fenced."""
        self.pause_s = 0.0
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self._attempts = self._tries = self._third_replica_tries = 0
        self._stale = self._unreached = self._looked = False
        """``_stale``: a replica knows a later step, or no quorum answers (``_unreached``). ``_looked``: it was
        refreshed."""

    def take_error(self) -> Exception | None:
        """``error``, once. The exception may refer to frames that refer to this machine: without the cycle, what they
        hold is freed at once.
        """
        error, self.error = self.error, None
        return error

    def _retry(self) -> bool:
        """Another attempt, after a pause where another proposer may be at work: the more attempts there were, the
        longer."""
        self.pause_s = 0.0
        if self._attempts and (not self.sparing or self.lineage.open or self._rivals.above):
            self.pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(self._tries, 16))
            self._tries += 1
        self.turn += 1
        self.state = REFRESHING if self._stale else RETRYING
        return True

    def _retry_for_third(self) -> bool:
        """A replica has refused to promise, and may promise a higher ballot."""
        self._third_replica_tries += 1
        return self._retry()

    def _not_reached(self) -> bool:
        """No quorum answers. The replicas may be others by now."""
        if self._looked:
            return self._give_up("no majority of its replicas answers")
        self._stale = self._unreached = True
        return self._retry()

    def refreshed(self, newer: bool) -> bool:
        """``newer``: the view is another one now. Otherwise a replica may lie, or this process can't learn it yet."""
        if self.state is not REFRESHING:
            return False
        unreached = self._unreached
        self._stale = self._unreached = False
        self._looked = True
        if newer:
            self.pause_s = 0.0
        elif unreached and not self.lineage.open:
            return self._give_up("no majority of its replicas answers")
        else:
            self.pause_s = max(self.pause_s, BACKOFF_FIRST_S)
        self.state = RETRYING
        return True

    def expire(self) -> bool:
        """The deadline is over."""
        state = self.state
        if state in (SYNCING, DONE, FAILED):
            return False
        if state is ACCEPTING and self._accepts.chosen:
            return self._too_few_copies()
        if state is PREPARING or state is GATHERING:
            return self._give_up("no majority of its replicas answered in time")
        if state in (RETRYING, REFRESHING, CARRYING):
            return self._give_up("other proposers or a layout change were in the way until the deadline")
        return self._give_up("no majority of its replicas confirmed the write in time")

    def _too_few_copies(self) -> bool:
        return self._give_up(f"only {self._accepts.copies_synced} of its replicas have synced the object's copy")

    def _conclude(self) -> bool:
        conclusion = self._conclusion
        if isinstance(conclusion, Exception):
            self._conclusion = None
            return self._fail(conclusion)
        self.outcome = conclusion
        self.state = DONE
        return True

    def _fenced(self, **said: bool) -> bool:
        """``said`` of the fence by so many replicas that no quorum is left: ``final``, ``lends``."""
        self.fenced = True
        if self.lineage.open:
            return self._give_up("its bucket is being deleted")
        return self._fail(NoSuchBucket("", **{what: "true" for what, is_so in said.items() if is_so}))

    def _unheard(self, found: Found) -> Found:
        self._shared.on_unheard(self.name, found.ballot)
        return found

    def _copy_unreadable(self) -> bool:
        return self._give_up(
            "its newest record's copy cannot be read now, and no older record may take its place", CopyUnreadable
        )

    def _give_up(self, reason: str, kind: type[ServiceUnavailable] = ServiceUnavailable) -> bool:
        if self.lineage.open:
            self._shared.counts["unknown"] += 1
            return self._fail(OutcomeUnknown(f"The write may or may not have been applied: {reason}. Read, or retry."))
        self._shared.counts["unavailable"] += 1
        return self._fail(kind(f"The key's register cannot be settled now: {reason}. Nothing was changed. Retry."))

    def _fail(self, error: Exception) -> bool:
        self.error = error
        self.state = FAILED
        return True
