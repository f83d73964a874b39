"""What is stored about the lifecycle of a bucket's objects: rules by which they expire. Pure.

``objects.code.lifecycle`` has what the rules mean.
"""

from __future__ import annotations

import msgspec

from storaged.objects.configuration.document import Kind
from storaged.wire import Message

OLD = "Prefix"
"""The form of a filter that is the rule's own Prefix, as in AWS's first version of lifecycle."""
ONE = ""
AND = "And"


class LifecycleFilter(Message, frozen=True):
    """Which objects a rule is for: all conditions must hold. ``larger_than``, ``smaller_than``: sizes in bytes, both
    exclusive. ``form``: how the client wrote it: OLD, ONE (at most one condition), or AND. ``empty_prefix``: it wrote a
    prefix without any text. That is no condition, but clients compare what they read with what they wrote.
    """

    prefix: str = ""
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    larger_than: int | None = None
    smaller_than: int | None = None
    form: str = ONE
    empty_prefix: bool = False


class LifecycleRule(Message, frozen=True):
    """What happens to the objects that match. 0 and False: that does not happen.

    ``days``: after their creation current versions expire; ``date_ms``: from this date on (midnight UTC, in
    milliseconds since 1970). ``marker``: a delete marker goes when it is the last version of its key.
    ``noncurrent_days``: so long after a version got a successor it is deleted, unless it is among the
    ``newer_noncurrent`` newest of the noncurrent ones. ``abort_days``: after it was begun an upload is aborted.
    ``marker_stays``: the client wrote that such a delete marker does not go. That is no action, and shown again.
    """

    id: str
    enabled: bool
    filter: LifecycleFilter
    days: int = 0
    date_ms: int = 0
    marker: bool = False
    noncurrent_days: int = 0
    newer_noncurrent: int = 0
    abort_days: int = 0
    marker_stays: bool = False


class Lifecycle(Message, frozen=True):
    """``transition_minimum``: the setting of that name, which is stored and returned. There are no transitions here."""

    rules: tuple[LifecycleRule, ...]
    transition_minimum: str = ""


LIFECYCLE = Kind("lifecycle", Lifecycle)
