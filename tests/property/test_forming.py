"""Nodes that start, stop and are built anew in any order: a new cluster begins, and a server that lost what it had
never begins by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.ports import LedgerReport
from storaged.node.forming import ids_of, judge_forming
from tests.examples import examples

NODES = 3


@dataclass
class Machine:
    """One node's ledger, as ``node.ledger`` keeps it."""

    ledger: bytes
    formed: bool = False
    nodes: dict[str, bytes] = field(default_factory=dict)
    up: bool = False
    begun_before: bool = False
    """Its disks took part in an earlier life, of which nothing is left."""

    def report(self, asking: str) -> LedgerReport:
        return LedgerReport(self.ledger, self.formed, self.nodes.get(asking, b""))


steps = st.lists(
    st.tuples(st.sampled_from(["start", "stop", "look", "rebuild"]), st.integers(0, NODES - 1)), max_size=60
)


def look(machines: dict[str, Machine], name: str) -> None:
    own = machines[name]
    reports = {other: m.report(name) if m.up else None for other, m in machines.items() if other != name}
    if judge_forming(own.ledger, reports).begin:
        own.formed, own.nodes = True, ids_of(reports)


@settings(max_examples=examples(400), deadline=None)
@given(steps)
def test_a_node_that_took_part_and_lost_its_ledger_never_begins_by_itself_once_the_cluster_is_formed(
    moves: list[tuple[str, int]],
) -> None:
    machines = {f"n{number}": Machine(b"ledger %d" % number) for number in range(NODES)}
    for count, (move, number) in enumerate(moves):
        name = f"n{number}"
        machine = machines[name]
        if move == "start":
            machine.up = True
        elif move == "stop":
            machine.up = False
        elif move == "rebuild":
            machines[name] = Machine(b"built anew %d" % count, begun_before=machine.formed or machine.begun_before)
        elif machine.up and not machine.formed:
            look(machines, name)
            others = [other for other in machines.values() if other is not machine]
            if all(
                other.formed for other in others
            ):  # the cluster is in use: registers may have been acknowledged with this disk
                assert not (machine.formed and machine.begun_before), "a server that was built anew answers blank"


@given(st.permutations(range(NODES)), st.lists(st.integers(0, NODES - 1), max_size=20))
def test_a_new_cluster_begins_in_whatever_order_its_nodes_start_and_look(order: list[int], looks: list[int]) -> None:
    machines = {f"n{number}": Machine(b"ledger %d" % number) for number in range(NODES)}
    for number in order[:-1]:
        machines[f"n{number}"].up = True
        for again in looks:
            if machines[f"n{again}"].up and not machines[f"n{again}"].formed:
                look(machines, f"n{again}")
        assert not any(machine.formed for machine in machines.values()), "one is missing"
    machines[f"n{order[-1]}"].up = True
    for again in [*looks, *range(NODES)]:
        if not machines[f"n{again}"].formed:
            look(machines, f"n{again}")
    assert all(machine.formed for machine in machines.values())


OWN, OTHER = b"own", b"other"


@pytest.mark.parametrize(
    ("others", "begin", "word"),
    [
        ({}, True, ""),
        ({"n2": LedgerReport(OTHER, False)}, True, ""),
        ({"n2": None, "n3": LedgerReport(OTHER, False)}, False, "no answer yet from n2"),
        ({"n2": None, "n3": LedgerReport(OTHER, True, OWN)}, True, ""),
        ({"n2": LedgerReport(OTHER, True, b"older")}, False, "built anew"),
        ({"n2": LedgerReport(OTHER, True, b"older"), "n3": LedgerReport(OTHER, True, OWN)}, False, "says n2"),
        ({"n2": LedgerReport(OTHER, True)}, False, "formed without these disks (says n2)"),
        ({"n2": None, "n3": LedgerReport(OTHER, True)}, False, "formed without these disks (says n3); no answer yet"),
    ],
)
def test_the_other_nodes_decide(others: dict[str, LedgerReport | None], begin: bool, word: str) -> None:
    verdict = judge_forming(OWN, others)
    assert verdict.begin == begin
    assert verdict.waits == ("no answer yet" in verdict.reason)
    assert word in verdict.reason
