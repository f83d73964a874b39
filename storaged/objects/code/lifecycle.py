"""What lifecycle rules mean: when a version, a delete marker or an upload is due. Pure.

Theory of operation. Time is counted in *days* since 1970, UTC. What is due after some days is due at the first midnight
that begins more than that many times 24 hours after its moment, as on AWS: an object of 15 January, 10:30, with three
days is due on 19 January, 00:00. So everything becomes due at the beginning of a day, and a day's number says when. Of
several rules the one with the earliest day counts.

* A *current version* is due some days after its creation, or from a date on. Where versions are kept it gets a delete
  marker; else it is deleted.
* A *noncurrent version* is due some days after it got a successor, unless too few noncurrent versions are newer. That
  moment is the creation of the successor; where the clocks of gateways differ, the later one of the two counts.
* A *delete marker* that is the last version of its key goes. With a rule of days or a date it has to be that old.
* An *upload* is due some days after it was begun.

A rule with tags or sizes means no delete marker: a marker has neither.

``day_ms`` is 86,400,000; a test may let a day last seconds.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/intro-lifecycle-rules.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.lifecycle import LIFECYCLE, LifecycleFilter, LifecycleRule

DAY_MS = 86_400_000

Tags = Callable[[], Mapping[str, str]]
"""The tags of a version, which are sealed: opened only where a rule asks for them."""


class Subject(NamedTuple):
    """A version as rules see it."""

    key: bytes
    size: int
    modified_ms: int
    tags: Tags


class Ready(NamedTuple):
    """An enabled rule, with its prefix as bytes."""

    prefix: bytes
    rule: LifecycleRule


class Rules:
    """The enabled rules of a bucket, by what they do. Made once for a configuration (``rules_of``)."""

    __slots__ = ("abort", "current", "markers", "noncurrent", "prefixes")

    def __init__(self, rules: Iterable[LifecycleRule]) -> None:
        ready = [Ready(rule.filter.prefix.encode(), rule) for rule in rules if rule.enabled]
        self.current = [one for one in ready if one.rule.days or one.rule.date_ms]
        self.markers = [
            one
            for one in ready
            if (one.rule.days or one.rule.date_ms or one.rule.marker) and _means_markers(one.rule.filter)
        ]
        self.noncurrent = [one for one in ready if one.rule.noncurrent_days]
        self.abort = [one for one in ready if one.rule.abort_days]
        self.prefixes = _least(one.prefix for one in (*self.current, *self.markers, *self.noncurrent))
        """Keys without one of these prefixes match no rule for objects."""

    def __bool__(self) -> bool:
        return bool(self.prefixes or self.abort)


def rules_of(configuration: Configuration) -> Rules:
    """The rules in a configuration: use ``configuration.derive(rules_of)``."""
    found = configuration.get(LIFECYCLE)
    return Rules(found.rules if found is not None else ())


def _least(prefixes: Iterable[bytes]) -> tuple[bytes, ...]:
    """The prefixes, in order, without those that begin with another one."""
    found: list[bytes] = []
    for prefix in sorted(set(prefixes)):
        if not found or not prefix.startswith(found[-1]):
            found.append(prefix)
    return tuple(found)


def _means_markers(wanted: LifecycleFilter) -> bool:
    return not wanted.tags and wanted.larger_than is None and wanted.smaller_than is None


def due_day(since_ms: int, days: int, day_ms: int = DAY_MS) -> int:
    """The first day that begins later than ``days`` after a moment."""
    return (since_ms + days * day_ms) // day_ms + 1


def matches(wanted: Ready, subject: Subject) -> bool:
    """Raises what opening the tags raises."""
    prefix, rule = wanted
    if not subject.key.startswith(prefix):
        return False
    conditions = rule.filter
    if conditions.larger_than is not None and subject.size <= conditions.larger_than:
        return False
    if conditions.smaller_than is not None and subject.size >= conditions.smaller_than:
        return False
    if conditions.tags:
        tags = subject.tags()
        return all(tags.get(name) == value for name, value in conditions.tags.items())
    return True


class Due(NamedTuple):
    day: int
    rule: LifecycleRule


def _earliest(found: Iterable[Due]) -> Due | None:
    return min(found, key=lambda due: due.day, default=None)


def _aged(rule: LifecycleRule, since_ms: int, day_ms: int) -> int:
    return due_day(since_ms, rule.days, day_ms) if rule.days else -(-rule.date_ms // day_ms)


def current_due(rules: Rules, subject: Subject, day_ms: int = DAY_MS) -> Due | None:
    """When a current version that is no delete marker expires; None: never."""
    return _earliest(
        Due(_aged(one.rule, subject.modified_ms, day_ms), one.rule) for one in rules.current if matches(one, subject)
    )


def marker_due(rules: Rules, key: bytes, modified_ms: int, day_ms: int = DAY_MS) -> Due | None:
    """When a delete marker that is the last version of its key goes."""
    return _earliest(
        Due(due_day(modified_ms, 0, day_ms) if rule.marker else _aged(rule, modified_ms, day_ms), rule)
        for prefix, rule in rules.markers
        if key.startswith(prefix)
    )


def noncurrent_due(
    rules: Rules, subject: Subject, since_ms: int, newer: int, *, is_marker: bool = False, day_ms: int = DAY_MS
) -> Due | None:
    """When a noncurrent version is deleted. ``since_ms``: when it got its successor. ``newer``: how many noncurrent
    versions are newer now.
    """
    return _earliest(
        Due(due_day(max(since_ms, subject.modified_ms), one.rule.noncurrent_days, day_ms), one.rule)
        for one in rules.noncurrent
        if newer >= one.rule.newer_noncurrent
        and (_means_markers(one.rule.filter) or not is_marker)
        and matches(one, subject)
    )


def upload_due(rules: Rules, key: bytes, begun_ms: int, day_ms: int = DAY_MS) -> Due | None:
    """When an upload is aborted."""
    return _earliest(
        Due(due_day(begun_ms, rule.abort_days, day_ms), rule) for prefix, rule in rules.abort if key.startswith(prefix)
    )


def first_look(rules: Rules, subject: Subject, *, is_marker: bool, versioned: bool, day_ms: int = DAY_MS) -> int | None:
    """The first day on which a change that made ``subject`` the newest version can make something of its key due; None:
    there is none. It may be too early: the look then says when to look again.
    """
    found = current_due(rules, subject, day_ms) if not is_marker else None
    days = [found.day] if found is not None else []
    if is_marker and (marker := marker_due(rules, subject.key, subject.modified_ms, day_ms)) is not None:
        days.append(marker.day)
    if versioned:
        # The version before, of which nothing but its key is known here, has just become noncurrent. Where some are
        # kept by their number, an older one may have lost its place among them.
        days += [
            due_day(subject.modified_ms, 0 if rule.newer_noncurrent else rule.noncurrent_days, day_ms)
            for prefix, rule in rules.noncurrent
            if subject.key.startswith(prefix)
        ]
    return min(days, default=None)
