"""What a layout lacks to trust no operator alone (``Layout.spread``). Pure.

Theory of operation. Racks name their operator, who may read, withhold or forge all that lies there. Rival operators
host one cloud together when no one of them can do any of that alone:

* of a block coded k+m an operator holds at most k-1 fragments, too few to read it, and at most m, so that the others
  can read it without that operator (``Profile.operator_max``);
* of the replicas of a partition, and of the seed disks, it holds a minority: it decides nothing, and stops nothing;
* nothing is kept as a whole copy, where k would be 1: neither in records nor beside them (``objects.write.sealing``).
  Records themselves are whole at each replica: names, sizes, and what gateways sealed.

A block with fewer chunks than k has fewer data fragments, and as few are enough to rebuild it. So an operator can
rebuild one that has no more chunks than it has fragments; what it gets is sealed. It can't withhold even that.

Nothing degrades: a write that can't keep these limits is refused, and data that lost a disk waits for room elsewhere.
So a cluster needs one operator more than its profile, to write while one is away: four for 4+2 and three replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

OPERATORS = "operators"
"""Of ``Layout.spread``."""


def minority_of(replicas: int) -> int:
    """The most replicas that are no majority, and without which the others are one."""
    return (replicas - 1) // 2


def share_of(operators: Iterable[str]) -> int:
    """How often the most frequent one is named."""
    shares: dict[str, int] = {}
    for operator in operators:
        shares[operator] = shares.get(operator, 0) + 1
    return max(shares.values(), default=0)


class SpreadFacts(NamedTuple):
    """What the limits depend on. ``unnamed``: racks with disks that name no operator. ``holders``: (operator, failure
    domain) of each active disk. ``width``: fragments of a block; ``domain_max`` and ``operator_max`` of them may be in
    one domain, and at one operator. ``seeds``: the operator of each seed disk.
    """

    unnamed: tuple[str, ...]
    holders: tuple[tuple[str, str], ...]
    profile: str
    width: int
    domain_max: int
    operator_max: int
    replicas: int
    seeds: tuple[str, ...]

    def room(self, in_domain: int) -> dict[str, int]:
        """Operator -> how many fragments, or replicas, it can take, with so many in each domain."""
        counts: dict[tuple[str, str], int] = {}
        for holder in self.holders:
            counts[holder] = counts.get(holder, 0) + 1
        found: dict[str, int] = {}
        for (operator, _), count in counts.items():
            found[operator] = found.get(operator, 0) + min(count, in_domain)
        return found

    @property
    def replicas_room(self) -> int:
        """How many replicas of a partition the operators can take."""
        each = minority_of(self.replicas)
        return sum(min(count, each) for count in self.room(1).values())

    def fragments_room(self, without: str = "") -> int:
        """How many fragments of a block the operators can take, but for one of them."""
        room = self.room(self.domain_max)
        return sum(min(count, self.operator_max) for operator, count in room.items() if operator != without)


def problems(facts: SpreadFacts) -> list[str]:
    """Why the operators can't hold what is asked for, with the numbers; empty when they can."""
    found = [f"rack {rack} names no operator, and data is spread over operators" for rack in facts.unnamed]
    operators, each = len({operator for operator, _ in facts.holders}), minority_of(facts.replicas)
    if facts.operator_max < 1:
        found.append(f"profile {facts.profile} spread over operators needs two data fragments, or one could read alone")
    elif (usable := facts.fragments_room()) < facts.width:
        found.append(
            f"profile {facts.profile} spread over operators needs {facts.width} disks with at most"
            f" {facts.operator_max} at one operator: {operators} operators give {usable}"
        )
    if (usable := facts.replicas_room) < facts.replicas:
        found.append(
            f"metadata wants {facts.replicas} replicas with at most {each} at one operator: {operators} operators give"
            f" {usable}"
        )
    if (share := share_of(facts.seeds)) > minority_of(len(facts.seeds)):
        at_most = minority_of(len(facts.seeds))
        found.append(f"one operator has {share} of {len(facts.seeds)} seed disks, and may have {at_most}")
    return found


def weaknesses(facts: SpreadFacts) -> list[str]:
    """What stops while one operator is away, a sentence each; empty when nothing does."""
    operators = {operator for operator, _ in facts.holders}
    left = min(map(facts.fragments_room, operators), default=0)
    if left >= facts.width:
        return []
    return [
        f"while one operator is away nothing is written: profile {facts.profile} needs {facts.width} disks at the"
        f" others, at most {facts.operator_max} at each, and they give {left}"
    ]
