"""A second layout is taken exactly when it moves nothing: compared with what the ring and the ranks
of both really are.
"""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, DiskEntry, Layout, NodeEntry
from storaged.cluster.moves import moves_between, places_digest
from tests.examples import examples

GROUPS = range(0, 4096, 16)
LOCATIONS = ("FR/par1/a", "FR/par2/b", "FR/lyo1/c", "DE/fra1/a")


def first() -> Layout:
    nodes = [
        NodeEntry(f"n{number}", LOCATIONS[number - 1], f"10.0.0.{number}:7400", ("storage",)) for number in (1, 2, 3)
    ]
    nodes.append(NodeEntry("gateway", LOCATIONS[0], "", ("gateway",)))
    disks = tuple(DiskEntry(f"{number:015x}{disk}", f"n{number}", 1000) for number in (1, 2, 3) for disk in (1, 2))
    return Layout("c1", 1, tuple(nodes), disks, tuple(disk.id for disk in disks[::2]), "4+2")


def ranks(layout: Layout) -> object:
    """All that decides where a register or a fragment lies, computed."""
    return (
        [layout.replicas_of(partition) for partition in (*range(PARTITIONS), SYSTEM_PARTITION)],
        [layout.preference(group) for group in GROUPS],
        layout.domain_by_disk,
        layout.domain_kind,
        {
            disk.id: (disk.node, disk.state, disk.weight, layout.node_by_name[disk.node].location)
            for disk in layout.disks
        },
        {disk.id: "storage" in layout.node_by_name[disk.node].roles for disk in layout.disks},
    )


changes = st.fixed_dictionaries(
    {},
    optional={
        "shuffle": st.permutations(range(6)),
        "nodes": st.permutations(range(4)),
        "address": st.integers(1, 3),
        "weight": st.tuples(st.integers(0, 5), st.sampled_from([1000, 1001, 4000])),
        "state": st.tuples(st.integers(0, 5), st.sampled_from(["active", "draining"])),
        "rack": st.tuples(st.integers(0, 3), st.sampled_from(LOCATIONS)),
        "home": st.tuples(st.integers(0, 5), st.integers(1, 3)),
        "id": st.integers(0, 5),
        "drop": st.integers(0, 5),
        "more": st.integers(1, 3),
        "gateways": st.sampled_from([0, 2]),
        "roles": st.sampled_from([("gateway", "storage"), ("gateway",)]),
        "seeds": st.permutations(range(3)),
        "replicas": st.sampled_from([3, 2]),
        "profile": st.sampled_from(["4+2", "2+2"]),
        "countries": st.sampled_from([(), ("FR",)]),
    },
)


def changed(layout: Layout, change: dict[str, object]) -> Layout:  # a line a kind of change
    nodes, disks = list(layout.nodes), list(layout.disks)
    match change.get("address"):
        case int(number):
            nodes[number - 1] = replace(nodes[number - 1], address="10.9.9.9:7400")
    match change.get("rack"):
        case (int(number), str(rack)):
            nodes[number] = replace(nodes[number], location=rack)
    match change.get("roles"):
        case tuple(roles):
            nodes[0] = replace(nodes[0], roles=roles)
    match change.get("weight"):
        case (int(number), int(weight)):
            disks[number] = replace(disks[number], weight=weight)
    match change.get("state"):
        case (int(number), str(state)):
            disks[number] = replace(disks[number], state=state)
    match change.get("home"):
        case (int(number), int(home)):
            disks[number] = replace(disks[number], node=f"n{home}")
    match change.get("id"):
        case int(number):
            disks[number] = replace(disks[number], id="f" * 16)
    match change.get("shuffle"):
        case list(order):
            disks = [disks[number] for number in order]
    match change.get("nodes"):
        case list(order):
            nodes = [nodes[number] for number in order]
    match change.get("drop"):
        case int(number):
            del disks[number]
    match change.get("more"):
        case int(home):
            disks.append(DiskEntry("e" * 16, f"n{home}", 1000))
    match change.get("gateways"):
        case int(count):
            nodes = [node for node in nodes if node.name != "gateway"]
            nodes += [NodeEntry(f"gw{number}", LOCATIONS[1], "", ("gateway",)) for number in range(count)]
    order = change.get("seeds", range(3))
    assert isinstance(order, (list, range))
    return Layout(
        layout.cluster,
        2,
        tuple(nodes),
        tuple(disks),
        tuple(layout.seeds[number] for number in order),
        str(change.get("profile", "4+2")),
        change.get("countries", ()),  # type: ignore[arg-type]
        change.get("replicas", 3),  # type: ignore[arg-type]
    )


@settings(max_examples=examples(150), deadline=None)
@given(changes)
@example({"address": 2, "gateways": 2, "profile": "2+2"})
@example({"shuffle": [5, 4, 3, 2, 1, 0], "nodes": [3, 2, 1, 0]})
@example({"weight": (0, 1001)})
@example({"rack": (3, "FR/par2/b")})
@example({"rack": (0, "FR/par2/b")})
@example({"more": 1})
def test_a_layout_is_taken_exactly_when_every_replica_set_and_every_rank_stays(change: dict[str, object]) -> None:
    before = first()
    after = changed(before, change)
    moves = moves_between(before, after)
    assert bool(moves) == (ranks(before) != ranks(after) or before.replicas != after.replicas)
    assert set(moves.partitions) == {
        number
        for number in (*range(PARTITIONS), SYSTEM_PARTITION)
        if before.replicas_of(number) != after.replicas_of(number)
    }
    assert bool(moves) == bool(moves_between(after, before))
    assert bool(moves) == (places_digest(before) != places_digest(after))


def test_what_would_move_is_named_and_counted() -> None:
    after = changed(first(), {"more": 2, "weight": (0, 4000)})
    text = str(moves_between(first(), after))
    assert "disk eeeeeeeeeeeeeeee of n2 is new" in text
    assert "weight 1000 to 4000" in text
    assert "of 1025 replica sets would change" in text
    assert not moves_between(first(), first())
