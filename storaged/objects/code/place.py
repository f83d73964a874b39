"""Placement: which disks hold the fragments of a part, and whether a write may be acknowledged with those that are
durable. Pure.

Theory of operation
    A layout ranks all its disks for a data id (``Layout.preference``). The *first choice* takes disks in that order,
    with at most m fragments in one failure domain and one on a disk. It is the same for every node that knows the
    epoch, so a record names only the exceptions (``Run.moved``).

    Where the layout trusts no operator alone (``Layout.spread``), an operator gets fewer fragments than suffice to read
    a block, and no more than it can do without. Then nothing degrades: there are no fallbacks, and a layout or a
    country with too few operators takes no write.

    A write that finds disks away keeps the living first choices and gives the positions of the others to the next
    living disks under the same limits. When the living disks can't hold the profile that way, it uses the cheapest
    *fallback* profile that they can hold, and repair recodes the part later. The rule that counts (``acceptable``): the
    durable fragments still include k after the loss of any one disk and, while the living disks span two domains, of
    any one domain.

    ``writable(disk_id)`` says whether a disk takes new fragments now: a hint from heartbeats. Only ``acceptable``,
    which judges fragments that are known to be synced, decides whether a write may be acknowledged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from storaged.cluster.layout import Layout, Profile, placement_group
from storaged.cluster.partitions import PartitionState
from storaged.errors import ServiceUnavailable
from storaged.fragments.ports import FragmentId
from storaged.ids import DATA_ID_BYTES
from storaged.objects.records import Run

Writable = Callable[[str], bool]

COPIES = Profile(1, 2)
"""The profile of a small object's copies on the register's three replicas."""

FIRST_CHOICES_MAX = 65536
"""Cached per layout: 4,096 groups of some profiles and sets of countries; about 200 bytes each."""


class Placement(NamedTuple):
    """``disks[i]`` takes fragment i. ``moved``: those that are not the first choice, as a ``Run`` stores them."""

    profile: Profile
    disks: tuple[str, ...]
    moved: dict[int, str]


def is_eligible(layout: Layout, disk_id: str, countries: Sequence[str]) -> bool:
    """Whether new fragments of a bucket of these countries may go to a disk of the layout."""
    country = layout.country_of(disk_id)
    return (
        layout.disk_by_id[disk_id].state == "active"
        and layout.allows(country)
        and (not countries or country in countries)
    )


def _ranked_choice(
    layout: Layout, group: int, profile: Profile, countries: tuple[str, ...]
) -> tuple[tuple[str, ...], bool]:
    """Up to n disks: by preference under the limits of domains and operators, then, when the layout has too few domains
    and operators decide nothing, by preference alone. And whether the limits alone gave n.
    """
    memo = layout.first_choices
    found = memo.get((group, profile, countries))
    if found is None:
        ranked = [disk_id for disk_id in layout.preference(group) if is_eligible(layout, disk_id, countries)]
        shares = _Shares(layout, profile, profile.m)
        chosen: list[str] = []
        for disk_id in ranked:
            if len(chosen) < profile.n and shares.has_room(disk_id):
                shares.add(disk_id)
                chosen.append(disk_id)
        whole = len(chosen) == profile.n
        if not whole and not layout.spreads:
            taken = set(chosen)
            chosen += [disk_id for disk_id in ranked if disk_id not in taken][: profile.n - len(chosen)]
        if len(memo) >= FIRST_CHOICES_MAX:
            memo.clear()
        found = memo[group, profile, countries] = tuple(chosen), whole
    return found


def first_choice(layout: Layout, data_id: bytes, profile: Profile, countries: Sequence[str] = ()) -> tuple[str, ...]:
    """The n disks of a data id's fragments in order, when all disks live: at most m in one domain (unless the layout
    has too few domains), one on a disk.

    Only active disks, and only in ``countries`` when some are named. Raises ServiceUnavailable when there are fewer
    than n.
    """
    chosen, _ = _ranked_choice(layout, placement_group(data_id), profile, tuple(countries))
    if len(chosen) < profile.n:
        raise ServiceUnavailable(
            f"profile {profile} needs {profile.n} disks; layout {layout.epoch} has {len(chosen)}{_inside(countries)}"
        )
    return chosen


def disks_of(run: Run, layout_of_epoch: Layout, data_id: bytes, countries: Sequence[str] = ()) -> tuple[str, ...]:
    """The disks of a run's fragments in order. ``layout_of_epoch`` is the layout of ``run.epoch``; ``countries``: those
    that the run was written with.

    Raises ValueError when it is another layout, or has no disk for a position that the run does not name itself.
    """
    if layout_of_epoch.epoch != run.epoch:
        raise ValueError(f"the run was placed under layout {run.epoch}, not {layout_of_epoch.epoch}")
    chosen, _ = _ranked_choice(layout_of_epoch, placement_group(data_id), run.profile, tuple(countries))
    if not run.moved and len(chosen) == run.profile.n:
        return chosen
    try:
        return tuple(
            run.moved[position] if position in run.moved else chosen[position] for position in range(run.profile.n)
        )
    except IndexError:
        raise ValueError(
            f"layout {run.epoch} has only {len(chosen)} disks{_inside(countries)} for a run of {run.profile}"
        ) from None


def choose(
    layout: Layout, data_id: bytes, target: Profile, writable: Writable, countries: Sequence[str] = ()
) -> Placement:
    """Where to write a part of profile ``target`` now.

    The target when living disks can hold it under the domain limit; otherwise the best fallback that they can hold so;
    otherwise the best that survives the loss of one more disk. Raises ServiceUnavailable, with the numbers, when none
    does.
    """
    group, countries = placement_group(data_id), tuple(countries)

    def takes(disk_id: str) -> bool:
        return is_eligible(layout, disk_id, countries) and writable(disk_id)

    def hold(profile: Profile, domain_limit: int) -> Placement | None:
        first, _ = _ranked_choice(layout, group, profile, countries)
        return _assign(layout, profile, first, layout.preference(group), takes, domain_limit)

    placement = hold(target, target.m)
    if placement is not None:
        return placement
    if layout.spreads:
        raise ServiceUnavailable(_no_operators(layout, target, countries, takes))
    living = [disk_id for disk_id in layout.preference(group) if takes(disk_id)]
    shares = Counter(layout.domain_by_disk[disk_id] for disk_id in living)
    for profile in _fallbacks(target):
        if _holds(profile, shares.values()) and (placement := hold(profile, profile.m)) is not None:
            return placement
    for profile in _fallbacks(target):
        if profile.n <= len(living) and (placement := hold(profile, profile.n)) is not None:
            return placement
    raise ServiceUnavailable(
        f"a write must survive the loss of one more disk: {len(living)} of {len(layout.disks)} disks take"
        f" writes{_inside(countries)}, in {len(shares)} {layout.domain_kind}s; the target {target} needs {target.n},"
        " the smallest fallback 2"
    )


def replaced(layout: Layout, group: int, profile: Profile, takes: Callable[[str, bool], bool]) -> Sequence[str] | None:
    """The disks that get the fragments of a placement group whose first choices don't take them, under the same profile
    and limits; None when there are too few. ``takes(disk, first)``: whether a disk takes a fragment; ``first``: it is a
    first choice.
    """
    first, _ = _ranked_choice(layout, group, profile, ())
    placement = _assign(
        layout,
        profile,
        first,
        layout.preference(group),
        lambda disk: is_eligible(layout, disk, ()) and takes(disk, disk in first),
        profile.m,
    )
    return None if placement is None else tuple(placement.moved.values())


def choose_prompt(
    layout: Layout,
    data_id: bytes,
    target: Profile,
    writable: Writable,
    prompt: Writable,
    countries: Sequence[str] = (),
) -> Placement:
    """As ``choose``, without disks that are not ``prompt`` where the others can hold as many parity fragments as the
    target has, and survive the loss of a domain if all writable disks could.
    """
    first, whole = _ranked_choice(layout, placement_group(data_id), target, tuple(countries))
    if whole and all(writable(disk_id) and prompt(disk_id) for disk_id in first):
        return Placement(target, first, {})  # what the rest would find, for nearly every write
    found = choose(layout, data_id, target, writable, countries)
    if all(map(prompt, found.disks)):
        return found
    try:
        other = choose(layout, data_id, target, lambda disk: writable(disk) and prompt(disk), countries)
    except ServiceUnavailable:
        return found
    disks = dict(enumerate(other.disks))
    safe = other.profile.m >= target.m and acceptable(layout, other.profile, disks, writable, countries)
    return other if safe else found


def _no_operators(layout: Layout, target: Profile, countries: Iterable[str], takes: Writable) -> str:
    living = [disk.id for disk in layout.disks if takes(disk.id)]
    operators = {layout.operator_by_disk[disk_id] for disk_id in living}
    return (
        f"profile {target} is spread over operators, at most {target.operator_max} fragments at one, and never weaker:"
        f" {len(living)} of {len(layout.disks)} disks take writes{_inside(countries)}, of {len(operators)} operators"
    )


class _Shares:
    """Counts fragments of a block in failure domains, and at operators where no one of them is trusted alone."""

    def __init__(self, layout: Layout, profile: Profile, domain_max: int) -> None:
        self._domains, self._domain_max = layout.domain_by_disk, domain_max
        self._operators = layout.operator_by_disk if layout.spreads else None
        self._operator_max = profile.operator_max
        self._counts: dict[str, int] = {}
        self._by_operator: dict[str, int] = {}

    def has_room(self, disk_id: str) -> bool:
        """Whether one more fragment may go to the disk's domain, and to its operator."""
        if self._counts.get(self._domains[disk_id], 0) >= self._domain_max:
            return False
        return self._operators is None or self._by_operator.get(self._operators[disk_id], 0) < self._operator_max

    def add(self, disk_id: str) -> None:
        domain = self._domains[disk_id]
        self._counts[domain] = self._counts.get(domain, 0) + 1
        if self._operators is not None:
            operator = self._operators[disk_id]
            self._by_operator[operator] = self._by_operator.get(operator, 0) + 1


def keeps_operators(layout: Layout, profile: Profile, disks: Iterable[str]) -> bool:
    """Whether no operator has more of these fragments of a block than the layout allows."""
    return not layout.spreads or layout.operator_share(disks) <= profile.operator_max


def _inside(countries: Iterable[str]) -> str:
    named = ", ".join(countries)
    return f" in {named}" if named else ""


def _holds(profile: Profile, shares: Iterable[int]) -> bool:
    """Whether this many living disks in each domain can hold the profile with at most m fragments in one domain, one on
    a disk.
    """
    return sum(min(share, profile.m) for share in shares) >= profile.n


@lru_cache(maxsize=64)
def _fallbacks(target: Profile) -> tuple[Profile, ...]:
    """Profiles to use when ``target`` can't be held under the domain limit, best first: no wider than it, and none with
    more data fragments.

    Profiles with two parity fragments come first (when the target has two): with one, a disk that fails during the
    write already makes it unacceptable. Then the least space per byte decides, then the most parity.
    """
    found = [Profile(k, m) for k in range(1, target.k + 1) for m in range(1, target.n - k + 1)]
    return tuple(sorted(found, key=lambda profile: (profile.m < min(2, target.m), profile.n / profile.k, -profile.m)))


def _assign(
    layout: Layout,
    profile: Profile,
    first: Sequence[str],
    candidates: Iterable[str],
    takes: Writable,
    domain_limit: int,
) -> Placement | None:
    """Living first choices keep their positions; the others go to the next living candidates, at most ``domain_limit``
    in a domain. None: too few.
    """
    disks: dict[int, str] = {}
    shares = _Shares(layout, profile, domain_limit)
    for position, disk_id in enumerate(first):
        if shares.has_room(disk_id) and takes(disk_id):
            disks[position] = disk_id
            shares.add(disk_id)
    moved: dict[int, str] = {}
    if len(disks) < profile.n:
        taken = set(disks.values())
        empty = [position for position in range(profile.n) if position not in disks]
        for disk_id in candidates:
            if disk_id in taken or not shares.has_room(disk_id) or not takes(disk_id):
                continue
            shares.add(disk_id)
            moved[empty[len(moved)]] = disk_id
            if len(moved) == len(empty):
                break
        else:
            return None
        disks |= moved
    return Placement(profile, tuple(disks[position] for position in range(profile.n)), moved)


def is_placed(layout: Layout, data_id: bytes, profile: Profile, disks: Sequence[str], countries: Sequence[str]) -> bool:
    """Whether the layout wants the fragments on these disks, in whatever order. Where it has fewer disks than the
    profile needs, it wants them on none but those.
    """
    wanted, _ = _ranked_choice(layout, placement_group(data_id), profile, tuple(countries))
    return set(disks) <= set(wanted) if len(wanted) < profile.n else set(wanted) == set(disks)


def near(
    layout: Layout, placement: Placement, data_id: bytes, disks: Sequence[str], countries: Sequence[str]
) -> Placement:
    """The same disks as ``placement``, in another order: each of ``disks``, where the fragments are now, keeps its
    position if it is among them. So the fewest fragments move.
    """
    left = [disk for disk in placement.disks if disk not in disks]
    found = tuple(disk if disk in placement.disks else left.pop(0) for disk in disks)
    first, _ = _ranked_choice(layout, placement_group(data_id), placement.profile, tuple(countries))
    moved = {position: disk for position, disk in enumerate(found) if first[position : position + 1] != (disk,)}
    return Placement(placement.profile, found, moved)


def acceptable(
    layout: Layout, profile: Profile, durable: Mapping[int, str], writable: Writable, countries: Sequence[str] = ()
) -> bool:
    """Whether a block may be acknowledged. ``durable``: position -> disk of the fragments that are synced.

    Where no operator is trusted alone, none may have k of them, and the others must have k. Otherwise the loss of any
    one disk must always leave k of them. The loss of any one domain must, too, whenever some profile on the living
    disks (of the bucket's ``countries``) could survive that: when they span two domains. The caller leaves out disks
    that were lost after their sync.
    """
    if layout.spreads:
        share = layout.operator_share(durable.values())
        return share < profile.k <= len(durable) - share
    domains = layout.domain_by_disk
    if _left([domains.get(disk_id, disk_id) for disk_id in durable.values()]) >= profile.k:
        return True  # a disk has no more of them than its domain
    if _left(durable.values()) < profile.k:
        return False
    return not _spans_domains(
        layout, (disk.id for disk in layout.disks if is_eligible(layout, disk.id, countries) and writable(disk.id))
    )


def _left(holders: Iterable[str]) -> int:
    """Fragments left when the holder of the most is lost."""
    shares: dict[str, int] = {}  # a Counter takes five times as long, and every small PUT calls this
    for holder in holders:
        shares[holder] = shares.get(holder, 0) + 1
    return sum(shares.values()) - max(shares.values(), default=0)


def _spans_domains(layout: Layout, disk_ids: Iterable[str]) -> bool:
    seen = ""
    for disk_id in disk_ids:
        domain = layout.domain_by_disk.get(disk_id, disk_id)
        if seen and domain != seen:
            return True
        seen = domain
    return False


def enough_copies(layout: Layout, replicas: Sequence[str], synced: frozenset[str], writable: Writable) -> bool:
    """Whether a small object may be acknowledged: its copies (profile 1+2) lie on the register's ``replicas``, those of
    ``synced`` durably.

    The same rule as ``acceptable``, but only the replicas can hold copies, so the living replicas decide whether two
    domains are possible.
    """
    durable = [disk_id for disk_id in replicas if disk_id in synced]
    if _left(durable) < COPIES.k:
        return False
    if not _spans_domains(layout, (disk_id for disk_id in replicas if disk_id in synced or writable(disk_id))):
        return True
    return _left(layout.domain_by_disk.get(disk_id, disk_id) for disk_id in durable) >= COPIES.k


def copies_rule(layout: Layout, replicas: Sequence[str], writable: Writable) -> Callable[[frozenset[str]], bool]:
    """``enough_copies`` as a function of the synced disks. Replicas in distinct domains, as those of a ring partition
    are, need any two copies, whatever is away. Of a partition that lost all others for good one replica is left, until
    another one comes: its copy is enough, else nothing could ever be copied from it.
    """
    if len({layout.domain_by_disk.get(disk_id, disk_id) for disk_id in replicas}) < len(replicas):
        return lambda synced: enough_copies(layout, replicas, synced, writable)
    counted, fewest = frozenset(replicas), min(len(replicas), COPIES.k + 1)
    return lambda synced: len(counted & synced) >= fewest


class CopyPlan(NamedTuple):
    """How small objects of one ring partition are kept in the ``state`` that it is in: so many ``copies``, by position,
    as the one run of ``runs``. While it moves, two replicas have a copy of the same position. ``enough``: the rule for
    their copies. ``id_tail``: the bytes after the data id in the id of the first copy.
    """

    state: PartitionState
    copies: int
    runs: tuple[Run, ...]
    enough: Callable[[frozenset[str]], bool]
    id_tail: bytes


def copy_plan(layout: Layout, state: PartitionState, writable: Writable) -> CopyPlan:
    count = len(state.present)
    first = FragmentId(bytes(DATA_ID_BYTES), 0, 1, count - 1, 0)
    rules = [copies_rule(layout, replicas, writable) for replicas in state.voters]
    return CopyPlan(
        state,
        count,
        (Run(0, 1, 1, count - 1, layout.epoch),),
        rules[0] if len(rules) == 1 else lambda synced: all(rule(synced) for rule in rules),
        first.pack()[DATA_ID_BYTES:],
    )


def largest_share(layout: Layout, disks: Iterable[str]) -> int:
    """How many of the disks the domain has that has the most."""
    return max(Counter(layout.domain_by_disk.get(disk, disk) for disk in disks).values(), default=0)


def spare(layout: Layout, profile: Profile, alive: Mapping[int, str]) -> tuple[int, int]:
    """How many more disks, and how many more failure domains, may fail, whichever they are, before the block can't be
    read.

    ``alive``: position -> disk of the fragments that can be read now. (-1, -1) when they are too few already.
    """
    domains = (layout.domain_by_disk.get(disk_id, disk_id) for disk_id in alive.values())
    return _may_fail(alive.values(), profile.k), _may_fail(domains, profile.k)


def _may_fail(holders: Iterable[str], k: int) -> int:
    counted = Counter(holders)
    left, failed = counted.total(), -1
    for _, share in [("", 0), *counted.most_common()]:
        left -= share
        if left < k:
            break
        failed += 1
    return failed
