"""Layouts that follow a first one: planned, signed, adopted, with disks added, drained, replaced and removed."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cli import create, forecast, planning
from storaged.cli.main import cli
from storaged.cli.succeeding import layouts_after
from storaged.cluster import issuing
from storaged.cluster.layout import Layout, Profile, Sparing, weaknesses
from storaged.cluster.move_settings import MoveSettings, document
from storaged.cluster.presigned import layout_after, spares_of
from storaged.cluster.signed_layout import sign_layout
from storaged.cluster.succession import check_successor
from storaged.errors import LayoutOvertaken, LayoutUnsafe, OperatorError, RecoverRefused
from storaged.objects.code.place import first_choice
from storaged.wire import encode
from tests.worlds.authority_folder import call, three_signed
from tests.worlds.layouts import first, with_nodes


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return three_signed(tmp_path / "authority")


def issue(place: Path, name: str, rack: str, *disks: str) -> None:
    options = [option for disk in disks for option in ("--disk", disk)]
    call("cluster", "issue", str(place), name, "--rack", rack, "--roles", "storage", "--address", "h:1", *options)


def history_of(place: Path) -> list[Layout]:
    loaded = issuing.load_authority(place)
    found = [create.read_layout(loaded, path) for path in (place / "layouts").iterdir()]
    found.sort(key=lambda one: one[1].epoch)
    for before, after in pairwise(found):
        assert after[1].predecessor == before[0].hash
        check_successor(before[1], before[0].hash, after[1])
    return [layout for _, layout in found]


def plan_of(place: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    call("cluster", "plan", str(place), "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    call("cluster", "plan", str(place))
    text = capsys.readouterr().out
    assert ("NO" in text) == (not all(found["survives"].values()))
    return found


def disk_of(place: Path, node: str, number: int) -> str:
    return next(one for one in create.load_plan(place).nodes if one.name == node).disks[number].id


def test_a_layout_that_moves_nothing_names_the_one_before(authority: Path) -> None:
    call("cluster", "issue", str(authority), "gateway2", "--rack", "FR/par2/b", "--roles", "gateway")
    call("cluster", "layout", str(authority))
    assert [layout.epoch for layout in history_of(authority)] == [1, 2]


def test_servers_are_added_and_what_moves_is_near_the_ideal(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    issue(authority, "n5", "DE/ber/e", "/srv/disk1")
    found = plan_of(authority, capsys)
    assert (found["layouts"], found["last"], found["moves_data"]) == ([100], 1, True)
    assert found["survives"] == {"before": True, "meanwhile": True, "after": True}
    for what in ("replicas", "fragments"):
        assert 0 < found[what]["ideal"] <= found[what]["moved"] <= 1.25 * found[what]["ideal"], found[what]
    assert any("n4 is new" in change for change in found["changes"])
    call("cluster", "layout", str(authority))
    assert "cluster apply layout-100.signed" in capsys.readouterr().out
    layouts = history_of(authority)
    assert [(layout.epoch, layout.base, layout.seeds_step) for layout in layouts] == [(1, 0, 0), (100, 1, 0)]
    folder = authority / "nodes" / "n4" / "identity"
    assert (folder / create.BASE_NAME).read_bytes() == (authority / "layouts" / "layout-1.signed").read_bytes()
    assert (folder / create.LAYOUT_NAME).read_bytes() == (authority / "layouts" / "layout-100.signed").read_bytes()


def test_a_seed_that_goes_is_exchanged_through_a_joint_layout(authority: Path) -> None:
    seed = history_of(authority)[0].seeds[2]
    assert seed == disk_of(authority, "n3", 0)
    call("disk", "remove", str(authority), "n3", seed)
    call("cluster", "layout", str(authority))
    _, joint, settled = history_of(authority)
    other = disk_of(authority, "n3", 0)
    assert (joint.epoch, joint.seeds_next, joint.seeds_step) == (100, (*joint.seeds[:2], other), 1)
    assert joint.disk_by_id[seed].state == "draining"
    assert (settled.epoch, settled.seeds, settled.seeds_next, settled.seeds_step) == (200, joint.seeds_next, (), 2)
    assert seed not in settled.disk_by_id
    assert create.load_plan(authority).epoch == 200


def test_each_layout_comes_with_those_for_the_loss_of_a_seed_disk_and_what_was_used_is_taken_over(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = issuing.load_authority(authority)
    signed, layout = create.read_layout(loaded, authority / create.LAYOUT_NAME)
    spares = spares_of(signed)
    assert spares == {seed: (disk_of(authority, layout.node_of(seed), 1),) for seed in layout.seeds}
    assert (authority / "nodes" / "n1" / "identity" / create.LAYOUT_NAME).read_bytes() == encode(signed)
    assert plan_of(authority, capsys)["seed_spares"] == {seed: list(disks) for seed, disks in spares.items()}
    call("cluster", "plan", str(authority))
    assert f"when one is lost      {layout.seeds[0]}: {spares[layout.seeds[0]][0]} of n1 takes its place" in (
        capsys.readouterr().out
    )
    call("disk", "remove", str(authority), "n3", layout.seeds[2])
    call("cluster", "layout", str(authority))
    joint, settled = (
        create.read_layout(loaded, authority / "layouts" / f"layout-{epoch}.signed")[0] for epoch in (100, 200)
    )
    assert not joint.following
    assert spares_of(settled).keys() == set(layout.seeds[:2]), "n3 has no other disk"
    step = settled.following[0]
    moved = layout_after(settled, step)
    used = layout_after(moved, moved.following[0])
    file = authority / "now.signed"
    file.write_bytes(encode(used))
    call("cluster", "adopt", str(authority), str(file))
    call("cluster", "layout", str(authority))
    after, found = create.read_layout(loaded, authority / create.LAYOUT_NAME)
    assert (found.epoch, found.predecessor, found.if_out) == (401, used.hash, "")
    assert step.comes in found.seeds
    assert after.following


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_is_replaced_answers_no_more(
    authority: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it is a seed disk, which the joint layout still names, or another one."""
    call("disk", "replace", str(authority), "n3", disk_of(authority, "n3", number))
    assert plan_of(authority, capsys)["survives"] == {"before": True, "meanwhile": False, "after": True}


def test_a_server_with_a_seed_is_replaced_by_another(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2:4000")
    call("node", "remove", str(authority), "n3")
    found = plan_of(authority, capsys)
    assert found["layouts"] == [100, 200]
    assert found["survives"] == {"before": True, "meanwhile": False, "after": True}, "n3 answers no more at once"
    call("cluster", "layout", str(authority))
    _, joint, settled = history_of(authority)
    assert {node.name for node in joint.nodes} == {"n1", "n2", "n3", "n4", "gateway"}
    assert "n3" not in settled.node_by_name
    assert settled.node_of(settled.seeds[2]) == "n4"
    assert not any(joint.disk_by_id[disk].node == "n3" for disk in joint.replicas_of(7))


def test_a_server_that_is_drained_before_it_goes_leaves_no_gap(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2:4000")
    for disk in ("/srv/disk1", "/srv/disk2"):
        call("disk", "drain", str(authority), "n3", disk)
    assert plan_of(authority, capsys)["survives"] == {"before": True, "meanwhile": True, "after": True}
    call("cluster", "layout", str(authority))
    call("node", "remove", str(authority), "n3")
    found = plan_of(authority, capsys)
    assert (found["partitions"], found["replicas"]["moved"], found["fragments"]["moved"]) == (0, 0, 0)
    assert found["survives"] == {"before": True, "meanwhile": True, "after": True}
    call("cluster", "layout", str(authority))
    assert [layout.epoch for layout in history_of(authority)] == [1, 100, 200, 300]


def test_two_seeds_are_exchanged_one_after_the_other(authority: Path) -> None:
    seeds = history_of(authority)[0].seeds
    for seed, node in zip(seeds[:2], ("n1", "n2"), strict=True):
        call("disk", "drain", str(authority), node, seed)
    call("cluster", "layout", str(authority))
    layouts = history_of(authority)
    assert [layout.seeds_step for layout in layouts] == [0, 1, 2, 3, 4]
    assert [layout.epoch for layout in layouts] == [1, 100, 200, 300, 400]
    assert not set(seeds[:2]) & set(layouts[-1].seeds)


def test_a_disk_is_replaced_under_an_id_of_its_own(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = disk_of(authority, "n2", 1)
    call("disk", "replace", str(authority), "n2", "/srv/disk2")
    after = disk_of(authority, "n2", 1)
    assert before != after
    assert f'id = "{after}"\ndirectory = "/srv/disk2"' in capsys.readouterr().out
    call("cluster", "layout", str(authority))
    assert history_of(authority)[1].disk_by_id[after].weight == 4000
    assert history_of(authority)[1].disk_by_id[after].rank == before, "it gets what the other disk had, and no more"
    call("disk", "replace", str(authority), "n2", "/srv/disk2", "/srv/disk7:8000")
    (new,) = [one for one in create.load_plan(authority).nodes[1].disks if one.directory == "/srv/disk7"]
    assert (new.weight, new.id != after, new.rank) == (8000, True, before)


@pytest.mark.parametrize("rack", ["DE/ber/e", "DE/mun/f"])
def test_a_server_that_comes_as_another_goes_gets_what_that_one_had(
    authority: Path, rack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1:4000", "/srv/disk2:4000")
    issue(authority, "n5", "DE/ber/e", "/srv/disk1:4000", "/srv/disk2:8000")
    call("cluster", "layout", str(authority))
    gone = [disk_of(authority, "n5", number) for number in range(2)]
    call("node", "remove", str(authority), "n5")
    issue(authority, "n6", rack, "/srv/disk1:8000", "/srv/disk2:4000", "/srv/disk3:1")
    found = plan_of(authority, capsys)
    for what in ("replicas", "fragments"):
        assert 0 < found[what]["ideal"] <= found[what]["moved"] <= 1.02 * found[what]["ideal"], found[what]
    call("cluster", "layout", str(authority))
    new = [disk_of(authority, "n6", number) for number in range(3)]
    signed = history_of(authority)[-1].disk_by_id
    assert [signed[disk].rank for disk in new] == [gone[1], gone[0], ""], "of alike weight; the third one is new"
    capsys.readouterr()
    assert plan_of(authority, capsys)["changes"] == [], "the list has the ranks of the layout"
    call("node", "remove", str(authority), "n6")
    issue(authority, "n7", "DE/ber/e", "/srv/disk1:4000")
    call("cluster", "layout", str(authority))
    assert history_of(authority)[-1].disk_by_id[disk_of(authority, "n7", 0)].rank == gone[0]


def test_an_adopted_layout_says_what_new_disks_have_inherited(
    authority: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list is an older one, from a backup. Without the ranks the next layout would move all of it once more."""
    issue(authority, "n5", "DE/ber/e", "/srv/disk1:4000")
    call("cluster", "layout", str(authority))
    gone = disk_of(authority, "n5", 0)
    call("node", "remove", str(authority), "n5")
    issue(authority, "n6", "DE/ber/e", "/srv/disk1:4000")
    listed = create.load_plan(authority)
    call("cluster", "layout", str(authority))
    newest = tmp_path / "newest.signed"
    newest.write_bytes((authority / create.LAYOUT_NAME).read_bytes())
    create.save_plan(authority, listed)
    call("cluster", "adopt", str(authority), str(newest))
    assert disk_of(authority, "n6", 0) in history_of(authority)[-1].disk_by_id
    (new,) = create.load_plan(authority).nodes[-1].disks
    assert new.rank == gone
    capsys.readouterr()
    assert plan_of(authority, capsys)["changes"] == []


def test_a_rank_that_another_disk_of_the_list_has_by_now_is_given_up(authority: Path) -> None:
    """Two administrators replaced one disk. One layout was overtaken, and its list could never be signed again."""
    call("cluster", "layout", str(authority))
    plan, layout = create.load_plan(authority), history_of(authority)[-1]
    (first_disk, *_), (mine, *_) = plan.nodes[0].disks, plan.nodes[1].disks
    gone, first_disk.id, first_disk.rank, mine.id, mine.rank = first_disk.id, "theirs", "", "mine", first_disk.id
    disks = tuple(replace(disk, id="theirs", rank=gone) if disk.id == gone else disk for disk in layout.disks)
    plan.take_ranks(replace(layout, disks=disks))
    assert (first_disk.rank, mine.rank) == (gone, "")
    mine.rank = "of one that went"
    plan.take_ranks(layout)
    assert mine.rank == "of one that went", "no layout knows the disk yet"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("add", "n1", "/srv/disk1"), "has a disk in /srv/disk1"),
        (("add", "n1", "/srv/disk1/:500"), "has a disk in /srv/disk1/"),
        (("add", "n1", ""), "'' names no directory"),
        (("add", "n1", ":500"), "':500' names no directory"),
        (("add", "n9", "/srv/disk1"), "n9 is no node"),
        (("add", "gateway", "/srv/disk1"), "gateway is no storage node"),
        (("drain", "n1", "/srv/disk9"), "has no disk '/srv/disk9'; there are: /srv/disk1"),
        (("replace", "n1", "/srv/disk1", "/srv/disk2"), "has another disk in /srv/disk2"),
        (("replace", "n1", "/srv/disk1", "/srv/disk2/"), "has another disk in /srv/disk2/"),
        (("replace", "n1", "/srv/disk1", "/srv/disk2:500"), "has another disk in /srv/disk2"),
    ],
)
def test_a_command_about_a_disk_that_is_not_there_changes_nothing(
    authority: Path, command: tuple[str, ...], said: str
) -> None:
    before = (authority / "cluster.json").read_bytes()
    with pytest.raises(OperatorError, match=said):
        call("disk", command[0], str(authority), *command[1:])
    assert (authority / "cluster.json").read_bytes() == before


def test_what_would_leave_too_few_racks_is_refused(authority: Path) -> None:
    call("disk", "drain", str(authority), "n3", "/srv/disk2")
    before = (authority / "cluster.json").read_bytes()
    for command in (("disk", "drain", str(authority), "n3", "/srv/disk1"), ("node", "remove", str(authority), "n3")):
        with pytest.raises(LayoutUnsafe, match="can't be brought into force"):
            call(*command)
    assert (authority / "cluster.json").read_bytes() == before


def test_a_folder_whose_layout_was_overtaken_adopts_the_one_that_was_decided(
    authority: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = issuing.load_authority(authority)
    last = create.last_signed(loaded, create.load_plan(authority))
    assert last is not None
    others = create.load_plan(authority)
    others.nodes.append(create.NodePlan("n5", "DE/ber/e", ("storage",), "h:1", disks=create.new_disks(["/d"])))
    (decided,) = layouts_after(others, last)
    file = tmp_path / "fetched"
    file.write_bytes(encode(sign_layout(decided, loaded.administration)))

    call("disk", "remove", str(authority), "n3", "/srv/disk1")
    call("cluster", "layout", str(authority))
    assert create.load_plan(authority).epoch == 200
    call("cluster", "adopt", str(authority), str(file))
    found = plan_of(authority, capsys)
    assert (found["last"], found["layouts"]) == (100, [300, 400]), "200 was signed here already, for another layout"
    assert any("of n5 is gone" in change for change in found["changes"])
    call("cluster", "layout", str(authority))
    with pytest.raises(OperatorError, match="no layout of this cluster"):
        call("cluster", "adopt", str(authority), str(authority / "cluster.json"))


def test_a_layout_that_is_the_folders_own_is_adopted_and_can_be_taken_back(authority: Path) -> None:
    """An administrator who is not sure which layout was decided fetches it, and adopts it."""
    issue(authority, "n4", "DE/fra/d", "/d")
    call("cluster", "layout", str(authority))
    file = authority / "fetched.signed"
    file.write_bytes((authority / create.LAYOUT_NAME).read_bytes())
    call("cluster", "adopt", str(authority), str(file))
    call("cluster", "abort", str(authority))
    assert len(history_of(authority)[-1].disks) == len(history_of(authority)[-2].disks)
    file.write_bytes((authority / "layouts" / "layout-1.signed").read_bytes())
    call("cluster", "adopt", str(authority), str(file))
    assert create.load_plan(authority).before == 0, "of another layout this folder does not know what it changed"


def test_a_layout_without_the_one_that_placed_everything_is_not_signed(authority: Path) -> None:
    issue(authority, "n4", "DE/fra/d", "/d")
    call("cluster", "layout", str(authority))
    (authority / "layouts" / "layout-1.signed").unlink()
    with pytest.raises(OperatorError, match=r"layouts/layout-000000000001\.signed from the directory of a gateway"):
        call("cluster", "layout", str(authority))


def test_a_joint_layout_that_was_signed_last_is_settled_first() -> None:
    before = first()
    plan = create.ClusterPlan("c1", "2+1", 100)
    joint = replace(before, epoch=100, base=1, seeds_next=("d1a", "d2a", "d3b"), seeds_step=1, predecessor=bytes(32))
    for node in joint.nodes:
        disks = [create.DiskPlan(one.id, "/d", one.weight) for one in joint.disks if one.node == node.name]
        plan.nodes.append(create.NodePlan(node.name, node.location, node.roles, node.address, "", disks))
    signed = create.signed_layout.SignedLayout(encode(joint), b"")
    plan.nodes[2].disks = [one for one in plan.nodes[2].disks if one.id != "d3a"]
    (settled,) = layouts_after(plan, (signed, joint))
    assert (settled.seeds, settled.seeds_next, settled.seeds_step, settled.epoch) == (joint.seeds_next, (), 2, 200)


# --- the profile


def test_the_profile_changes_by_a_layout_that_moves_nothing(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = create.load_plan(authority)
    call("cluster", "profile", str(authority), "4+2", "--dry-run")
    assert "2+1 to 4+2, on 6 disks: 1.50 to 1.50 bytes" in capsys.readouterr().out
    assert create.load_plan(authority) == before
    call("cluster", "profile", str(authority), "03+2")
    assert create.load_plan(authority).profile == "3+2"
    found = plan_of(authority, capsys)
    assert (found["layouts"], found["moves_data"], found["partitions"]) == ([2], False, 0)
    assert found["profile"] == {"before": "2+1", "after": "3+2"}
    assert found["stored_factor"] == {"before": 1.5, "after": pytest.approx(5 / 3)}
    call("cluster", "plan", str(authority))
    assert "coded again: 1.50 to 1.67 bytes are stored for each byte (+11%)" in capsys.readouterr().out
    call("cluster", "layout", str(authority))
    assert [(layout.epoch, layout.profile) for layout in history_of(authority)] == [(1, "2+1"), (2, "3+2")]


@pytest.mark.parametrize(("free", "code"), [(20 << 30, 0), (7 << 30, 1)], ids=["enough space", "too little space"])
def test_a_plan_says_how_many_bytes_another_profile_takes(
    authority: Path, capsys: pytest.CaptureFixture[str], free: int, code: int
) -> None:
    """From 1.5 to 3 bytes for each. Some disks get twice as much as others."""
    last = history_of(authority)[-1]
    call("cluster", "profile", str(authority), "1+2")
    found, text = planned_with(authority, status_of(last, used=8 << 30, free=free), capsys, code=code)
    assert "about 96.0 GiB; stored now: 48.0 GiB" in text
    assert ("REFUSED" in text) == bool(code)
    assert found["profile"] == {"before": "2+1", "after": "1+2"}


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("8+3", "needs 11 disks with at most 3 in one rack: 6 disks in 3 racks give 6"),
        ("5+1", "needs 6 disks with at most 1 in one rack: 6 disks in 3 racks give 3"),
        ("4+0", "at least one data and one parity fragment"),
        ("0+2", "at least one data"),
        ("4", "is not a profile"),
        ("four+two", "is not a profile"),
        ("254+2", "at most 255 fragments"),
    ],
)
def test_a_profile_that_the_disks_cannot_hold_is_refused_with_the_numbers(
    authority: Path, profile: str, said: str
) -> None:
    before = create.load_plan(authority)
    with pytest.raises(OperatorError, match=re.escape(said)):
        call("cluster", "profile", str(authority), profile)
    assert create.load_plan(authority) == before


# --- operators


OPERATORS = {"FR/par1/a": "anne", "FR/par2/b": "bert", "FR/lyo1/c": "carl", "DE/fra/d": "dora"}


def name_operators(place: Path, named: dict[str, str]) -> None:
    for rack, name in named.items():
        call("rack", "operator", str(place), rack, name)


def test_an_abort_says_that_a_profile_that_changed_with_places_stays(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    call("cluster", "layout", str(authority))
    before = history_of(authority)[-1].profile
    name_operators(authority, OPERATORS)
    call("cluster", "profile", str(authority), "4+2", "--spread", "operators")
    call("cluster", "layout", str(authority))
    capsys.readouterr()
    call("cluster", "abort", str(authority))
    assert f"the profile stays 4+2: `storaged cluster profile` takes back {before}" in capsys.readouterr().out
    assert (history_of(authority)[-1].profile, history_of(authority)[-1].spread) == ("4+2", "")


def test_a_profile_is_spread_over_operators(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    call("cluster", "layout", str(authority))
    with pytest.raises(LayoutUnsafe, match="rack DE/fra/d names no operator"):
        call("cluster", "profile", str(authority), "4+2", "--spread", "operators")
    name_operators(authority, OPERATORS)
    call("rack", "operator", str(authority), "DE/fra/d", "somebody else", "--dry-run")
    assert create.load_plan(authority).operators == OPERATORS
    found = plan_of(authority, capsys)
    assert not found["moves_data"], "operators alone move nothing"
    assert "the operator of rack DE/fra/d changes from none to dora" in found["changes"]
    call("cluster", "profile", str(authority), "4+2", "--spread", "operators")
    said = capsys.readouterr().out
    assert "at most 2 fragments of a block at one operator" in said
    assert "Gateways code the small objects (up to 256 KiB) that are there" in said
    assert "with a customer's key (SSE-C) stay whole copies" in said
    found = plan_of(authority, capsys)
    assert found["moves_data"]
    assert found["labels"] == []
    call("cluster", "layout", str(authority))
    assert history_of(authority)[-1].spread == "operators"
    call("cluster", "abort", str(authority))
    assert history_of(authority)[-1].spread == "", "the places that were before are wanted again"
    call("cluster", "profile", str(authority), "4+2", "--spread", "operators")
    call("cluster", "layout", str(authority))
    call("rack", "rename", str(authority), "DE/fra/d", "DE/fra/dd")
    call("rack", "operator", str(authority), "DE/ber/e", "emma")
    found = plan_of(authority, capsys)
    assert not found["moves_data"], "a rack that is renamed keeps its operator, and one without disks has no data"
    call("cluster", "layout", str(authority))
    issue(authority, "n5", "DE/ber/e", "/srv/disk1", "/srv/disk2")
    call("cluster", "layout", str(authority))
    last = history_of(authority)[-1]
    assert {last.operator_by_disk[disk.id] for disk in last.disks} == {"anne", "bert", "carl", "dora", "emma"}
    assert "DE/fra/d" not in last.operator_by_rack
    call("cluster", "profile", str(authority), "4+2", "--spread", "racks")
    call("cluster", "layout", str(authority))
    assert history_of(authority)[-1].spread == ""


def test_operators_that_cannot_hold_a_profile_are_refused_with_the_numbers(authority: Path) -> None:
    name_operators(authority, {"FR/par1/a": "anne", "FR/par2/b": "bert", "FR/lyo1/c": "carl"})
    for profile, said in (
        ("2+1", None),
        ("4+2", None),
        ("1+2", "needs two data fragments, or one could read alone"),
        ("5+3", "needs 8 disks with at most 3 at one operator: 3 operators give 6"),
    ):
        if said is None:
            call("cluster", "profile", str(authority), profile, "--spread", "operators")
            continue
        with pytest.raises(LayoutUnsafe, match=re.escape(said)):
            call("cluster", "profile", str(authority), profile)
    before = create.load_plan(authority)
    with pytest.raises(LayoutUnsafe, match="2 operators give 2"):
        call("rack", "operator", str(authority), "FR/lyo1/c", "anne")
    with pytest.raises(LayoutUnsafe, match="rack FR/lyo1/c names no operator"):
        call("rack", "operator", str(authority), "FR/lyo1/c")
    with pytest.raises(OperatorError, match="is not COUNTRY/SITE/RACK"):
        call("rack", "operator", str(authority), "par9", "anne")
    with pytest.raises(OperatorError, match="printable"):
        call("rack", "operator", str(authority), "FR/par1/a", "a\tb")
    assert create.load_plan(authority) == before


def test_three_operators_hold_it_and_the_plan_says_what_the_outage_of_one_stops(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name_operators(authority, {"FR/par1/a": "anne", "FR/par2/b": "bert", "FR/lyo1/c": "carl"})
    call("cluster", "profile", str(authority), "4+2", "--spread", "operators")
    (label,) = plan_of(authority, capsys)["labels"]
    assert label["code"] == "LAYOUT_WEAK"
    assert "while one operator is away nothing is written" in label["text"]


def test_a_majority_of_seed_disks_at_one_operator_is_exchanged_before(authority: Path) -> None:
    """The racks of the first three servers have one operator; three more come."""
    for number, rack in enumerate(("DE/fra/d", "DE/ber/e", "DE/ham/f"), 4):
        issue(authority, f"n{number}", rack, "/srv/disk1", "/srv/disk2")
    call("cluster", "layout", str(authority))
    racks = ("FR/par1/a", "FR/par2/b", "FR/lyo1/c")
    name_operators(authority, dict.fromkeys(racks, "anne"))
    name_operators(authority, {"DE/fra/d": "dora", "DE/ber/e": "emma", "DE/ham/f": "fred"})
    call("cluster", "profile", str(authority), "4+2", "--spread", "operators")
    call("cluster", "layout", str(authority))
    layouts = history_of(authority)[2:]
    assert [(layout.spread, layout.seeds_step) for layout in layouts] == [
        *(("", 1), ("", 2)),
        *(("operators", 3), ("operators", 4)),
    ]
    last = layouts[-1]
    assert last.operator_share(last.seeds) == 1


# --- the outlook


def test_a_cluster_in_two_racks_does_not_survive_one() -> None:
    three = first()
    one_rack = replace(three, nodes=tuple(replace(node, location="FR/par1/x") for node in three.nodes))
    assert planning.outlook(three, [three]).survives == {"before": True, "meanwhile": True, "after": True}
    found = planning.outlook(one_rack, [one_rack])
    assert (found.domain, found.survives["after"]) == ("node", True)


def test_meanwhile_counts_the_joint_states() -> None:
    """Of two replicas in one rack while a third one moves, the rack has a majority."""
    three = first()
    together = replace(
        three, nodes=tuple(replace(n, location="FR/par1/n1") if n.name in ("n1", "n2") else n for n in three.nodes)
    )
    wanted = replace(with_nodes(together, "n4", "n5"), epoch=100, base=1)
    found = planning.outlook(together, [wanted])
    assert found.domain == "rack"
    assert found.survives["after"] is False, "the seeds n1 and n2 are in one rack"


def test_movement_is_compared_with_the_shares() -> None:
    found = planning.movement([("a", "b"), ("a", "b")], [("a", "c"), ("c", "b")])
    assert (found.moved, found.total, found.ideal, found.share) == (2, 4, 2, 0.5)
    assert "1.00 times the ideal" in str(found)
    swapped = planning.movement([("a",), ("b",)], [("b",), ("a",)])
    assert (swapped.moved, swapped.ideal) == (2, 0)
    assert "the ideal is none" in str(swapped)


# --- what the cluster adds


def status_of(layout: Layout, used: int = 8 << 30, free: int = 64 << 30, **changes: Any) -> dict[str, Any]:
    """As ``storaged status --json`` prints it, as far as ``plan`` reads it."""
    nodes = [
        {
            "name": node.name,
            "disks": [
                {"id": disk.id, "bytes_used": used, "bytes_free": free, "state": "ok"}
                for disk in layout.disks
                if disk.node == node.name
            ],
        }
        for node in layout.nodes
    ]
    moving = {"partitions": 0, "objects": 0, "system": False, "settings": document(MoveSettings())}
    return {"cluster": layout.cluster, "epoch": layout.epoch, "nodes": nodes, "moving": moving, **changes}


def planned_with(
    place: Path, status: dict[str, Any], capsys: pytest.CaptureFixture[str], code: int = 0
) -> tuple[dict[str, Any], str]:
    """The document and the text of ``plan --status``."""
    file = place / "status.json"
    file.write_text(json.dumps(status))
    said = []
    for options in (("--json",), ()):
        capsys.readouterr()
        try:
            call("cluster", "plan", str(place), "--status", str(file), *options)
            found = 0
        except SystemExit as ended:
            found = int(ended.code or 0)
        assert found == code
        said.append(capsys.readouterr().out)
    return json.loads(said[0]), said[1]


def test_a_plan_says_how_many_bytes_move(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (last,) = history_of(authority)
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    found, text = planned_with(authority, status_of(last), capsys)
    new = {disk.id for disk in create.load_plan(authority).nodes[-1].disks}
    assert found["bytes"]["total"] == len(last.disks) * (8 << 30)
    share = found["fragments"]["share"]
    assert abs(found["bytes"]["moved"] / found["bytes"]["total"] - share) < 0.02
    assert sum(found["bytes"]["comes"].values()) == pytest.approx(found["bytes"]["moved"], rel=0.01)
    assert set(found["bytes"]["unknown"]) == new, "they are not in use yet"
    assert found["labels"] == []
    assert "bytes that move       about" in text
    assert "whether 2 disks that are not in use yet have the room is not known" in text
    plan = plan_of(authority, capsys)
    assert plan["bytes"] is None, "no cluster was asked"
    assert plan["seeds"] == {"before": list(last.seeds), "after": list(last.seeds)}
    assert all(f"{seed} of {last.node_of(seed)}" in text for seed in last.seeds), "an operator has to know them"


def test_a_plan_says_how_long_it_takes_at_the_pace_that_is_set(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (last,) = history_of(authority)
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    status = status_of(last)
    found, text = planned_with(authority, status, capsys)
    assert found["bytes"]["durations"]["fragments"] == {"seconds": None, "paused": False}
    assert text.count("as fast as disks and network allow: no pace is set") == 2
    status["moving"]["settings"] = document(MoveSettings(partitions_per_min=30, bytes_per_s=1 << 20))
    found, text = planned_with(authority, status, capsys)
    seconds = {job: one["seconds"] for job, one in found["bytes"]["durations"].items()}
    assert seconds["partitions"] == pytest.approx(2 * found["replicas"]["moved"])
    assert seconds["fragments"] == pytest.approx(found["bytes"]["moved"] / (4 << 20), rel=0.001), "four storage nodes"
    assert "at the pace that is set" in text
    status["moving"]["settings"] = document(MoveSettings(partitions_paused=True, partitions_per_min=30))
    found, text = planned_with(authority, status, capsys)
    assert found["bytes"]["durations"]["partitions"] == {"seconds": None, "paused": True}
    assert "is paused" in text


def test_a_plan_for_which_disks_are_too_small_is_refused(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (last,) = history_of(authority)
    call("disk", "drain", str(authority), "n3", disk_of(authority, "n3", 1))
    found, text = planned_with(authority, status_of(last, free=1 << 30), capsys, code=1)
    (label,) = found["labels"]
    assert (label["code"], label["refused"]) == ("PLAN_TOO_LITTLE_SPACE", True)
    assert f"disk {disk_of(authority, 'n3', 0)} gets about 8.0 GiB and has 1.0 GiB free" in label["text"]
    assert "REFUSED  PLAN_TOO_LITTLE_SPACE" in text
    planned_with(authority, status_of(last, free=9 << 30), capsys)


def test_a_plan_on_an_older_layout_is_refused(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (last,) = history_of(authority)
    with pytest.raises(LayoutOvertaken, match="Layout 100 is in force, and the last one in this folder is 1"):
        planned_with(authority, status_of(last, epoch=100), capsys)
    with pytest.raises(OperatorError, match="this is the status of cluster other, and the folder is of eu-1"):
        planned_with(authority, status_of(last, cluster="other"), capsys)
    with pytest.raises(OperatorError, match="this is no status of a running cluster"):
        planned_with(authority, {"cluster": "eu-1"}, capsys)
    (authority / "none.json").write_text("{")
    with pytest.raises(OperatorError, match="is not what storaged status --json printed"):
        call("cluster", "plan", str(authority), "--status", str(authority / "none.json"))
    with pytest.raises(OperatorError, match="use one of them"):
        call("cluster", "plan", str(authority), "--status", str(authority / "none.json"), "--ask", str(authority))


def test_a_plan_counts_what_a_dead_disk_had(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (last,) = history_of(authority)
    gone = disk_of(authority, "n3", 1)
    call("disk", "replace", str(authority), "n3", gone)
    status = status_of(last)
    disks = {disk["id"]: disk for node in status["nodes"] for disk in node["disks"]}
    held = Counter(
        disk
        for group in range(0, 4096, 4)
        for disk in first_choice(last, (group << 4).to_bytes(2, "big") + bytes(14), Profile(2, 1))
    )
    for disk, count in held.items():
        disks[disk]["bytes_used"] = count << 20
    alive, _ = planned_with(authority, status, capsys)
    disks[gone] |= {"state": "blank", "bytes_used": 0, "bytes_free": 0}
    dead, _ = planned_with(authority, status, capsys)
    assert alive["bytes"]["moved"] > 0
    assert dead["bytes"]["moved"] == pytest.approx(alive["bytes"]["moved"], rel=0.01)
    assert dead["bytes"]["total"] == pytest.approx(alive["bytes"]["total"], rel=0.01)


def test_a_plan_names_disks_that_were_not_drained_and_moves_that_have_not_ended(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (last,) = history_of(authority)
    gone = disk_of(authority, "n3", 1)
    call("disk", "remove", str(authority), "n3", gone)
    status = status_of(last)
    found, text = planned_with(authority, status, capsys)
    assert [(label["code"], label["refused"]) for label in found["labels"]] == [("DISK_NOT_DRAINED", False)]
    assert f"DISK_NOT_DRAINED: disk {gone} of n3 answers" in text
    for node in status["nodes"]:
        for disk in node["disks"]:
            disk["state"] = "slow" if disk["id"] == gone else "ok"
    found, text = planned_with(authority, status, capsys)
    assert f"DISK_NOT_DRAINED: disk {gone} of n3 answers" in text
    for node in status["nodes"]:
        for disk in node["disks"]:
            disk["state"] = "down" if disk["id"] == gone else "ok"
    status["moving"] |= {"partitions": 12, "objects": 3, "system": True}
    found, text = planned_with(authority, status, capsys)
    assert [label["code"] for label in found["labels"]] == ["MOVE_UNFINISHED"]
    assert "12 partitions, 3 objects, the system partition" in text
    call("cluster", "layout", str(authority))
    found, _ = planned_with(authority, status_of(last), capsys)
    assert [label["code"] for label in found["labels"]] == ["MOVE_UNFINISHED"]
    assert "was signed and is not in force yet: 1 is" in found["labels"][0]["text"]


def test_a_layout_that_a_rack_stops_has_a_label() -> None:
    three = first()
    assert weaknesses(three) == []
    together = replace(
        three, nodes=tuple(replace(n, location="FR/par1/n1") if n.name in ("n1", "n2") else n for n in three.nodes)
    )
    (label,) = forecast.labels_of(three, [together], None, None)
    assert (label.code, label.refused) == ("LAYOUT_WEAK", False)
    assert "fewer than three racks with disks" in label.text
    (label,) = forecast.labels_of(three, [replace(with_nodes(together, "n4", "n5"), epoch=100, base=1)], None, None)
    assert label.text.startswith("2 of 3 seed disks are in one rack, FR/par1/n1")
    one = replace(three, nodes=three.nodes[:1], disks=tuple(replace(disk, node="n1") for disk in three.disks))
    assert "fewer than three nodes" in weaknesses(one)[0]


# --- taking back


def places_of(layout: Layout) -> list[tuple[str, ...]]:
    return [tuple(sorted(layout.replicas_of(number))) for number in range(1024)]


def test_a_change_is_taken_back_and_what_it_added_drains(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    drained = disk_of(authority, "n2", 1)
    call("disk", "drain", str(authority), "n2", drained)
    call("cluster", "layout", str(authority))
    first, changed = history_of(authority)
    assert places_of(first) != places_of(changed)
    capsys.readouterr()
    call("cluster", "abort", str(authority), "--dry-run", "--json")
    found = json.loads(capsys.readouterr().out)
    new = [disk.id for disk in changed.disks if disk.node == "n4"]
    assert (found["to"], found["signed"], found["layouts"]) == (1, False, [200])
    assert (found["back"], found["going"], found["nodes"]) == ([drained], new, [])
    assert len(history_of(authority)) == 2, "a dry run signs nothing"
    call("cluster", "abort", str(authority))
    said = capsys.readouterr().out
    assert f"disk {new[0]} gives up what it has" in said
    assert "cluster apply layout-200.signed" in said
    taken_back = history_of(authority)[-1]
    assert places_of(taken_back) == places_of(first)
    assert {disk: taken_back.disk_by_id[disk].state for disk in new} == dict.fromkeys(new, "draining")
    call("node", "remove", str(authority), "n4")
    call("cluster", "layout", str(authority))
    assert places_of(history_of(authority)[-1]) == places_of(first)


def test_a_server_that_was_removed_is_named_again_with_its_seed(authority: Path) -> None:
    (first,) = history_of(authority)
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    call("node", "remove", str(authority), "n3")
    call("cluster", "layout", str(authority))
    assert [layout.epoch for layout in history_of(authority)] == [1, 100, 200]
    call("cluster", "abort", str(authority))
    layouts = history_of(authority)
    assert [layout.epoch for layout in layouts] == [1, 100, 200, 300, 400], "the seed disk is exchanged, too"
    assert places_of(layouts[-1]) == places_of(first)
    assert [layouts[-1].node_of(seed) for seed in layouts[-1].seeds] == [first.node_of(seed) for seed in first.seeds]
    plan = create.load_plan(authority)
    (n3,) = (node for node in plan.nodes if node.name == "n3")
    assert [disk.directory for disk in n3.disks] == ["/srv/disk1", "/srv/disk2"], "as its configuration has them"
    call("cluster", "abort", str(authority))  # and this is taken back, too
    again = history_of(authority)[-1]
    assert places_of(again) == places_of(layouts[2])


def test_a_change_of_the_profile_is_no_change_of_places_to_take_back(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issue(authority, "n4", "DE/fra/d", "/srv/disk1", "/srv/disk2")
    call("cluster", "layout", str(authority))
    call("cluster", "profile", str(authority), "1+2")
    call("cluster", "layout", str(authority))
    with pytest.raises(OperatorError, match=r"the last change is the profile, 2\+1 to 1\+2"):
        call("cluster", "abort", str(authority))
    assert [layout.epoch for layout in history_of(authority)] == [1, 100, 101], "n4 keeps its places"
    call("cluster", "abort", str(authority), "--to", "1", "--dry-run")
    assert "the places of layout 1 are wanted again" in capsys.readouterr().out


def test_what_can_not_be_taken_back_is_named(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(said: str, *options: str) -> None:
        before = (authority / "cluster.json").read_bytes()
        with pytest.raises(OperatorError, match=said):
            call("cluster", "abort", str(authority), *options)
        assert (authority / "cluster.json").read_bytes() == before
        assert len(history_of(authority)) == layouts

    layouts = 1
    refused("does not know from which layout")
    refused("layout 1 is not earlier than the last one, 1", "--to", "1")
    call("disk", "replace", str(authority), "n3", "/srv/disk2")
    refused("has changes that were not signed", "--to", "1")
    call("cluster", "layout", str(authority))
    layouts = 2
    refused("was replaced by .* in the same directory, /srv/disk2: what it had is gone")
    refused("layout 7 is not in this folder", "--to", "7")


# --- after a loss for good


def losses_of(layout: Layout, *disks: str, **changes: Any) -> dict[str, Any]:
    """As ``storaged cluster losses --json`` prints it."""
    rows = [{"partition": 7, "left": ["x"], "keys": 3}, {"partition": 9, "left": ["x"], "keys": None}]
    found = {"cluster": layout.cluster, "epoch": layout.epoch, "disks": list(disks), "partitions": rows}
    more = {"answering": [], "system_lost": False, "system": None, "unknown": [], "silent": [], "nothing_left": []}
    return {**found, **more, "keys_max": 100_000, **changes}


def recovered(place: Path, losses: dict[str, Any], *options: str) -> None:
    (place / "losses.json").write_text(json.dumps(losses))
    call("cluster", "recover", str(place), "--losses", str(place / "losses.json"), *options)


def test_recovery_signs_only_what_was_typed(authority: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (last,) = history_of(authority)
    lost = [disk_of(authority, "n2", 1), disk_of(authority, "n3", 1)]
    losses = losses_of(last, *lost)
    before = (authority / "cluster.json").read_bytes()
    recovered(authority, losses)
    said = capsys.readouterr().out
    assert "2 of 1024 partitions have no majority" in said
    assert "partition 7: x is left; 3 keys are there" in said
    assert "Nothing was signed. To do it: --unsafe" in said
    words = f"lose 2 partitions; {lost[0]} {lost[1]} are powered off for ever"
    for typed in ("", "yes", words.upper(), words + " "):
        with pytest.raises(RecoverRefused, match="these are not the words"):
            recovered(authority, losses, "--unsafe", "--words", typed)
    assert (authority / "cluster.json").read_bytes() == before
    assert len(history_of(authority)) == 1
    recovered(authority, losses, "--unsafe", "--words", words)
    layouts = history_of(authority)
    assert layouts[-1].lost == tuple(lost)
    assert not set(lost) & layouts[-1].disk_by_id.keys()
    issue(authority, "n4", "DE/fra/d", "/srv/disk1")
    call("cluster", "layout", str(authority))
    assert history_of(authority)[-1].lost == tuple(lost), "they stay lost"
    with pytest.raises(OperatorError, match=r"gives data to disk .*, which it calls lost for good"):
        call("cluster", "abort", str(authority), "--to", "1")


def test_recovery_of_the_system_partition_signs_one_that_goes_on_and_two_for_each_seed_disk(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (last,) = history_of(authority)
    lost = [disk_of(authority, name, number) for name in ("n2", "n3") for number in (0, 1)]
    left = last.seeds[0]
    system = {"seeds": list(last.seeds), "lost": list(last.seeds[1:]), "left": [left], "registers": {"users": 3}}
    losses = losses_of(last, *lost, system_lost=True, system=system, unknown=[1, 2, 3], silent=["n4"])
    with pytest.raises(OperatorError, match="can't be brought into force: No disk can take the place of seed disk"):
        recovered(authority, losses)
    for name in ("n4", "n5"):
        issue(authority, name, f"DE/fra/{name}", "/srv/disk1", "/srv/disk2")
    capsys.readouterr()
    recovered(authority, losses)
    said = capsys.readouterr().out
    for words in (f"seed disk {left} is left, with 3 users", "an older policy", "where 3 of 1024", "no disk of n4"):
        assert words in said
    assert len(history_of(authority)) == 1
    typed = f"lose the system partition and 2 partitions and what 3 unknown partitions lose; {' '.join(lost)} are"
    recovered(authority, losses, "--unsafe", "--words", f"{typed} powered off for ever")
    made = history_of(authority)[1:]
    assert [layout.seeds_step for layout in made] == [2, 3, 4, 5, 6]
    assert [len(layout.seeds_lost) for layout in made] == [2, 2, 1, 1, 0]
    assert {layout.seeds_recovered for layout in made} == {made[0].epoch}
    assert set(made[-1].seeds).isdisjoint(lost)
    assert left in made[-1].seeds
    assert not set(lost) & {disk.id for layout in made for disk in layout.disks}
    issue(authority, "n6", "DE/fra/n6", "/srv/disk1")
    call("cluster", "layout", str(authority))
    assert history_of(authority)[-1].seeds == made[-1].seeds
    call("cluster", "plan", str(authority))


def test_a_recovery_that_is_not_needed_or_can_not_be_is_refused(authority: Path) -> None:
    (last,) = history_of(authority)
    lost = disk_of(authority, "n2", 1)
    words = ("--unsafe", "--words", "lose 2 partitions")
    for changes, said in (
        ({"partitions": []}, "Every partition has a majority"),
        ({"system_lost": True, "system": {"seeds": [lost], "lost": [lost], "left": []}}, "No seed disk is left"),
        ({"answering": [lost]}, "still answers. Power its node off for ever"),
    ):
        with pytest.raises(RecoverRefused, match=said):
            recovered(authority, losses_of(last, lost, **changes), *words)
    with pytest.raises(LayoutOvertaken):
        recovered(authority, losses_of(last, lost, epoch=100), *words)
    with pytest.raises(OperatorError, match="losses of cluster other"):
        recovered(authority, losses_of(last, lost, cluster="other"), *words)
    with pytest.raises(OperatorError, match="is not what storaged cluster losses --json printed"):
        recovered(authority, {"cluster": "eu-1"}, *words)
    assert len(history_of(authority)) == 1


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(args=["cluster", "--help"], prog_name="storaged", standalone_mode=False)
    out = capsys.readouterr().out
    for name in ("plan", "apply", "fetch", "adopt", "renew", "layout", "abort"):
        assert name in out


def test_when_disks_that_are_away_are_replaced_is_signed_and_moves_nothing(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("cluster", "sparing", str(authority))
    assert "after 600 s (fragments) and 3600 s (registers), in 1 failure domain at a time" in capsys.readouterr().out
    call("cluster", "sparing", str(authority), "--fragments", "20s", "--registers", "5m", "--domains", "2")
    found = plan_of(authority, capsys)
    assert not found["partitions"]
    assert any("20 s (fragments) and 300 s" in change for change in found["changes"])
    call("cluster", "layout", str(authority))
    before, after = history_of(authority)
    assert (before.sparing, after.sparing) == (Sparing(), Sparing(20, 300, 2))
    for mistake in (("--fragments", "soon"), ("--registers", "1s")):
        with pytest.raises(OperatorError):
            call("cluster", "sparing", str(authority), *mistake)


def test_a_server_comes_back_to_its_rack_under_the_name_that_the_rack_has_now(authority: Path) -> None:
    """Under its former name the rack would count as two, and two of three replicas could be in it. What its certificate
    says of its operator stays, too: a renewed one says the same.
    """
    call("cluster", "issue", str(authority), "n4", "--rack", "FR/par1/a", "--roles", "storage", "--address", "h:1",
         "--disk", "/srv/disk1", "--jurisdiction", "DE")  # fmt: skip
    call("cluster", "layout", str(authority))
    before = history_of(authority)[-1]
    call("node", "remove", str(authority), "n4")
    call("cluster", "layout", str(authority))
    call("rack", "rename", str(authority), "FR/par1/a", "FR/par1/hall-2")
    call("cluster", "layout", str(authority))
    call("cluster", "abort", str(authority))
    after = history_of(authority)[-1]
    racks = {name: entry.location for name, entry in after.node_by_name.items()}
    assert racks["n4"] == racks["n1"] == "FR/par1/hall-2"
    assert places_of(before) == places_of(after)
    assert {node.name: node.jurisdiction for node in create.load_plan(authority).nodes}["n4"] == "DE"
    assert {entry.certified_location for entry in after.nodes if entry.location == "FR/par1/hall-2"} == {"FR/par1/a"}
