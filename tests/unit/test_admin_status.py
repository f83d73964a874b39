"""The verdict follows from the facts alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.admin.status import (
    Durability,
    Facts,
    FirstSeen,
    NodeFacts,
    RepairWaits,
    RingHealth,
    judge,
    ring_health,
)
from storaged.cli.status import render
from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, DiskEntry, Layout, NodeEntry
from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import DiskStatus
from storaged.errors import every_error
from storaged.node.doctor import certificate_check

RACKS = {"n1": "FR/par1/a", "n2": "FR/par2/b", "n3": "FR/lyo1/c"}
LAYOUT = Layout(
    "c",
    7,
    tuple(NodeEntry(name, rack, "h:1", ("storage",)) for name, rack in RACKS.items()),
    tuple(DiskEntry(f"{name}-{index}", name, 1) for name in RACKS for index in (1, 2)),
    ("n1-1", "n2-1", "n3-1"),
)
NOW = 1_000_000


def node(name: str, *, up: bool = True, disk_state: str = "ok", skew_ms: int = 0) -> NodeFacts:
    disks = [
        DiskStatus(f"{name}-{index}", f"/{name}/{index}", disk_state if index == 1 else "ok", 10, 20)
        for index in (1, 2)
    ]
    return NodeFacts(
        name, RACKS[name], ("storage",), up, NOW - 4000, 1 if up else None, f"/{name}", skew_ms, disks if up else []
    )


def facts(*nodes: NodeFacts, profile: str | None = "4+2", **more: Any) -> Facts:
    given = {entry.name: entry for entry in nodes}
    return Facts(LAYOUT, [given.get(name, node(name)) for name in RACKS], profile, **more)


def codes(found: dict[str, Any]) -> list[str]:
    return [entry["code"] for entry in found["problems"]]


def test_a_gateway_that_the_policy_denies_its_keys_is_down_and_says_the_rule() -> None:
    found = judge(facts(key_refusal="certificate validity: this gateway's certificate has expired"), NOW)
    assert found["verdict"] == "DOWN"
    assert (found["reads"], found["writes"]) == ("stopped", None)
    assert codes(found) == ["KEY_RELEASE_REFUSED"]
    assert "expired" in found["problems"][0]["detail"]


def test_all_well_is_healthy() -> None:
    found = judge(facts(), NOW)
    assert found["verdict"] == "HEALTHY"
    assert found["problems"] == []
    assert [entry["state"] for entry in found["nodes"]] == ["up"] * 3
    assert found["nodes"][0]["disks"][0] == {
        "id": "n1-1",
        "directory": "/n1/1",
        "state": "ok",
        "bytes_used": 10,
        "bytes_free": 20,
    }


def test_a_refused_layout_is_named_with_its_epoch_and_who_offered_it() -> None:
    refused = RefusedLayout(8, "node n4", "Layout 8 would move data against layout 7: disk d of n4 is new.")
    found = judge(facts(dataclasses.replace(node("n2"), refused=[refused])), NOW)
    assert found["verdict"] == "DEGRADED"
    assert codes(found) == ["LAYOUT_REFUSED"]
    assert found["problems"][0]["subject"] == "FR/par2/b/n2"
    assert found["problems"][0]["detail"] == f"layout 8, offered by node n4: {refused.reason}"


def test_a_rack_away_is_degraded_and_names_the_node() -> None:
    found = judge(facts(node("n2", up=False), profile="2+2"), NOW)
    assert found["verdict"] == "DEGRADED"
    assert codes(found) == ["NODE_DOWN"]
    assert found["problems"][0]["subject"] == "FR/par2/b/n2"
    assert found["problems"][0]["since"] == NOW - 4000
    assert [disk["state"] for disk in found["nodes"][1]["disks"]] == ["down", "down"]
    text = render(found, command="storaged")
    assert "writes OK (2+2)" in text
    assert "storaged dev start n2" in text
    assert "down 4 s" in text


def test_two_racks_away_is_down_since_registers_have_no_majority() -> None:
    found = judge(facts(node("n2", up=False), node("n3", up=False), profile=None), NOW)
    assert found["verdict"] == "DOWN"
    assert "QUORUM_LOST" in codes(found)


def test_refused_writes_are_at_risk() -> None:
    found = judge(facts(profile=None, write_reason="too few disks"), NOW)
    assert found["verdict"] == "AT_RISK"
    assert "writes refused: too few disks" in render(found)


@pytest.mark.parametrize(
    ("counted", "verdict"),
    [
        (Durability(0, 0, 0), "HEALTHY"),
        (Durability(3, 0, 0), "DEGRADED"),
        (Durability(3, 1, 0), "AT_RISK"),
        (Durability(1, 0, 1), "AT_RISK"),
        (Durability(1, objects_unreadable=1), "AT_RISK"),
    ],
)
def test_what_repair_counted_decides(counted: Durability, verdict: str) -> None:
    found = judge(facts(durability=counted), NOW)
    assert found["verdict"] == verdict
    assert found["objects_below_target"] == counted.objects_below_target
    assert f"{counted.objects_lost} lost" in render(found, command="storaged")


def test_what_waits_for_disks_that_are_away_is_told_apart_from_what_is_lost() -> None:
    found = judge(facts(durability=Durability(5, objects_unreadable=4)), NOW)
    assert (found["objects_lost"], found["objects_unreadable"], found["reads"]) == (0, 4, "stopped for some objects")
    assert codes(found) == ["OBJECTS_UNREADABLE", "OBJECTS_BELOW_TARGET"]
    assert "0 lost, 4 waiting for disks that are away, 5 objects below target" in render(found, command="storaged")


def test_problems_are_dated_from_when_they_were_first_seen_and_anew_when_they_return() -> None:
    seen = FirstSeen()

    def dated(now_ms: int, below: int) -> dict[str, int]:
        full = facts(
            node("n1", disk_state="full" if below else "ok"), node("n2", up=False), durability=Durability(below)
        )
        return {entry["code"]: entry["since"] for entry in seen.date(judge(full, now_ms))["problems"]}

    assert dated(NOW, 7) == {"DISK_FULL": NOW, "NODE_DOWN": NOW - 4000, "OBJECTS_BELOW_TARGET": NOW}
    assert dated(NOW + 60_000, 8) == {"DISK_FULL": NOW, "NODE_DOWN": NOW - 4000, "OBJECTS_BELOW_TARGET": NOW}
    assert dated(NOW + 70_000, 0) == {"NODE_DOWN": NOW - 4000}
    assert dated(NOW + 80_000, 1)["OBJECTS_BELOW_TARGET"] == NOW + 80_000


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("foreign", "DISK_FOREIGN"),
        ("damaged", "DISK_DAMAGED"),
        ("read-only", "DISK_READ_ONLY"),
        ("full", "DISK_FULL"),
        ("index-damaged", "INDEX_DAMAGED"),
        ("lost", "DISK_LOST"),
        ("failed", "DISK_DOWN"),
        ("hung", "DISK_HUNG"),
        ("unreadable", "DISK_UNREADABLE"),
        ("checking", "DISK_CHECKED"),
        ("a state of another version", "DISK_DOWN"),
    ],
)
def test_a_disk_that_does_not_take_part_fully_is_named(state: str, code: str) -> None:
    found = judge(facts(node("n1", disk_state=state)), NOW)
    assert found["verdict"] == "DEGRADED"
    assert codes(found) == [code]
    assert found["problems"][0]["subject"].endswith("n1/n1-1")


def test_a_disk_that_the_node_does_not_have_is_named() -> None:
    bare = dataclasses.replace(node("n1"), disks=node("n1").disks[:1])
    assert codes(judge(facts(bare), NOW)) == ["DISK_DOWN"]


def test_a_wrong_keyring_stops_everything() -> None:
    found = judge(facts(keyring_problem="another keyring"), NOW)
    assert (found["verdict"], found["reads"], found["writes"]) == ("DOWN", "stopped", None)


def test_a_skewed_clock_is_named() -> None:
    assert codes(judge(facts(node("n3", skew_ms=-9000)), NOW)) == ["CLOCK_SKEWED"]


def test_every_problem_can_be_explained() -> None:
    known = {kind.code for kind in every_error()}
    all_wrong = facts(
        node("n1", disk_state="full", skew_ms=9000),
        node("n2", up=False),
        node("n3", up=False),
        keyring_problem="x",
        key_refusal="x",
        durability=Durability(1, 1, 1),
    )
    assert set(codes(judge(all_wrong, NOW))) <= known


def test_a_second_gateway_that_no_node_calls_is_unknown_and_no_problem() -> None:
    second = NodeFacts("gw2", "FR/par1/a", ("gateway",), False, NOW, silent=True)
    found = judge(dataclasses.replace(facts(), nodes=[*facts().nodes, second]), NOW)
    assert (found["verdict"], found["nodes"][-1]["state"]) == ("HEALTHY", "unknown")
    heard = dataclasses.replace(second, silent=False)
    assert codes(judge(dataclasses.replace(facts(), nodes=[*facts().nodes, heard]), NOW)) == ["NODE_DOWN"]


def stopped_without(disks: set[str]) -> int:
    """Counted one by one, as the definition says."""
    partitions = (*range(PARTITIONS), SYSTEM_PARTITION)
    return sum(2 * len(set(LAYOUT.replicas_of(one)) - disks) <= len(LAYOUT.replicas_of(one)) for one in partitions)


def test_status_repeats_that_the_layout_does_not_survive_a_rack() -> None:
    assert judge(facts(), NOW)["weaknesses"] == []
    two = replace(LAYOUT, nodes=tuple(replace(entry, location=RACKS["n1"]) for entry in LAYOUT.nodes))
    found = judge(Facts(two, [node(name) for name in RACKS], "4+2"), NOW)
    assert found["verdict"] == "HEALTHY", "it works"
    assert "  LAYOUT_WEAK: there are fewer than three racks with disks" in render(found)


def test_status_says_what_the_next_lost_disk_would_stop() -> None:
    assert judge(facts(), NOW)["next_failure"]["disk_partitions"] == 0
    assert "one more disk" not in render(judge(facts(), NOW))
    found = judge(facts(node("n2", disk_state="failed")), NOW)
    worst = found["next_failure"]
    away = {"n2-1"}
    others = {disk.id for disk in LAYOUT.disks} - away
    assert (
        worst["disk_partitions"]
        == stopped_without(away | {worst["disk"]})
        == max(stopped_without(away | {one}) for one in others)
    )
    domains = set(LAYOUT.domain_by_disk.values())
    by_domain = {
        name: stopped_without(away | {d for d, where in LAYOUT.domain_by_disk.items() if where == name})
        for name in domains
    }
    assert worst["domain_partitions"] == by_domain[worst["domain"]] == max(by_domain.values())
    assert f"one more disk: {worst['disk_partitions']} of the {PARTITIONS + 1} partitions of the ring stop" in render(
        found
    )


def test_a_partition_that_moves_stops_without_a_majority_of_either_set() -> None:
    """Only one moves: n3's first disk comes for n1's. All others are on disks that no loss here concerns."""
    safe = ("n1-2", "n2-2", "n3-2")

    def sets_of(partition: int) -> tuple[tuple[str, ...], ...]:
        return (("n1-1", "n2-1", "n2-2"), ("n3-1", "n2-1", "n2-2")) if partition == 7 else (safe,)

    def ring(*away: str) -> RingHealth:
        return ring_health(LAYOUT, lambda disk: disk not in away, sets_of)

    assert ring().by_disk == {}
    assert ring().by_domain == {"FR/par2/b": 1}
    assert ring("n2-2", "n1-2").by_disk["n1-1"] == ring("n2-2", "n1-2").by_disk["n3-1"] == 1
    assert ring("n3-1").stopped == 0
    assert ring("n3-1", "n2-1").stopped == 1  # the set that it has is alive, the one that comes is not
    assert ring("n1-1", "n2-1").stopped == 1
    assert ring_health(LAYOUT, lambda _: True, lambda partition: () if partition == 7 else (safe,)).stopped == 1


@pytest.mark.parametrize(
    ("waits", "said"),
    [
        (
            RepairWaits(("n2-1",), 420.0, 600.0),
            "repair waits for disk n2-1; what other disks can hold is recoded for them in 7 min",
        ),
        (
            RepairWaits(("a", "b", "c", "d"), None, 600.0),
            "repair waits for disks a, b, c and 1 more; nothing is recoded for other disks while",
        ),
        (
            RepairWaits((), None, 600.0, unrepaired=(("disk d hangs", 2), ("no room", 1))),
            "not repaired: 2 objects: disk d hangs; not repaired: 1 object: no room",
        ),
    ],
)
def test_status_says_why_repair_waits(waits: RepairWaits, said: str) -> None:
    found = judge(facts(durability=Durability(3, waits=waits)), NOW)
    assert said in found["problems"][0]["detail"]
    assert said in render(found)


def test_repair_that_no_gateway_serves_is_a_problem_of_its_own() -> None:
    waits = RepairWaits((), None, 600.0, "No gateway took what this node asked; it asks again later.")
    found = judge(facts(durability=Durability(3, waits=waits)), NOW)
    problems = {one["code"]: one["detail"] for one in found["problems"]}
    assert problems["REPAIR_WAITS_FOR_GATEWAY"] == waits.gateway
    assert "repair waits for a gateway" in problems["OBJECTS_BELOW_TARGET"]


def test_a_storage_node_that_cannot_write_to_its_own_directory_is_named() -> None:
    found = judge(facts(unwritable=[("n1", ""), ("n2", "the ledger can't be written: No space left on device")]), NOW)
    assert found["verdict"] == "DEGRADED"
    (problem,) = [entry for entry in found["problems"] if entry["code"] == "NODE_DIRECTORY_UNWRITABLE"]
    assert (problem["subject"], problem["detail"]) == ("n2", "the ledger can't be written: No space left on device")


@pytest.mark.parametrize(
    ("days", "state"), [(31, "ok"), (30, "ok"), (29, "warn"), (1, "warn"), (0, "fail"), (-3, "fail")]
)
def test_doctor_warns_of_any_nodes_certificate_thirty_days_ahead(days: int, state: str) -> None:
    check = certificate_check("n2", NOW + days * 86_400_000, NOW)
    assert (check["state"], check["detail"]) == (state, f"expires in {days} days")
    assert state == "ok" or "cluster renew AUTHORITY n2" in check["hint"]


def test_what_several_problems_want_alike_is_said_once() -> None:
    found = judge(facts(node("n1", disk_state="full"), node("n2", disk_state="full")), NOW)
    text = render(found)
    assert text.count("DISK_FULL") == 3, "two subjects, one hint"
    assert text.count("Next:") == 1


def test_status_does_not_say_that_nothing_moves_while_nobody_knows_where_partitions_are() -> None:
    nothing = {"partitions": 0, "joint": 0, "of": 1025, "system": False, "objects": 0, "reason": ""}
    found = judge(facts(), NOW)
    assert "moving" not in render({**found, "moving": nothing})
    assert "not known yet" in render({**found, "moving": {**nothing, "partitions": None, "joint": None}})
    stale = {**found, "moving": {**nothing, "objects": None}}
    assert "how many objects have to move is not known yet" in render({**stale, "objects_counted": True})
    assert "how many objects" not in render({**stale, "objects_counted": False}), "it says that they are counted"


def test_a_slow_disk_is_a_warning_and_leaves_the_verdict_as_it_is() -> None:
    found = judge(facts(node("n1", disk_state="slow")), NOW)
    assert (found["verdict"], found["problems"]) == ("HEALTHY", [])
    assert [(entry["code"], entry["subject"]) for entry in found["warnings"]] == [("DISK_SLOW", "FR/par1/a/n1/n1-1")]
    two = judge(facts(node("n1", disk_state="slow"), node("n2", disk_state="slow")), NOW)
    assert (two["verdict"], two["problems"], two["metadata"]) == ("HEALTHY", [], "quorum")
    assert two["next_failure"] == judge(facts(), NOW)["next_failure"], "a slow replica votes"


def test_a_disk_that_fills_up_is_a_warning_and_leaves_the_verdict_as_it_is() -> None:
    found = judge(facts(filling={"n1-1": "1 GiB are free"}), NOW)
    assert (found["verdict"], found["problems"]) == ("HEALTHY", [])
    assert [(entry["code"], entry["subject"]) for entry in found["warnings"]] == [("DISK_FILLING", "FR/par1/a/n1/n1-1")]
    assert "n1-1  DISK_FILLING (a warning): 1 GiB are free" in render(found)
    seen = FirstSeen()
    assert seen.date(found)["warnings"][0]["since"] == NOW
    later = judge(facts(filling={"n1-1": "less"}), NOW + 5000)
    assert seen.date(later)["warnings"][0]["since"] == NOW
