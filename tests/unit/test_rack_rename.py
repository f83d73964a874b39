"""A rack gets another name: nothing moves, no node refuses another, and no other change passes for a rename."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from msgspec.structs import replace

from storaged.cli import create, joining
from storaged.cluster.issuing import load_authority
from storaged.cluster.layout import PARTITIONS, Layout, Profile, confirmed_roles
from storaged.cluster.moves import moves_between, places_digest
from storaged.cluster.succession import is_numbered_as_moving
from storaged.errors import OperatorError
from storaged.objects.code.place import first_choice
from tests.worlds.authority_folder import SAID, answered, call, three_signed
from tests.worlds.layouts import first


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return three_signed(tmp_path / "authority")


def newest(place: Path) -> Layout:
    return create.read_layout(load_authority(place), place / create.LAYOUT_NAME)[1]


def moved(layout: Layout, **places: tuple[str, str]) -> Layout:
    """``layout`` with nodes at other locations: (location, what the certificate says)."""
    nodes = tuple(
        replace(node, location=places[node.name][0], certified=places[node.name][1]) if node.name in places else node
        for node in layout.nodes
    )
    return replace(layout, nodes=nodes)


def test_a_rename_moves_nothing(authority: Path, capsys: SAID) -> None:
    before = newest(authority)
    done = answered(capsys, "rack", "rename", str(authority), "FR/par1/a", "FR/par9/z")
    assert done["nodes"] == ["n1", "gateway"]
    planned = answered(capsys, "cluster", "plan", str(authority))
    assert (planned["moves_data"], planned["partitions"], planned["fragments"]["moved"]) == (False, 0, 0)
    assert "node n1 changes: location FR/par1/a to FR/par9/z" in planned["changes"]
    call("cluster", "layout", str(authority))
    after = newest(authority)
    assert (after.epoch, is_numbered_as_moving(after), after.node_by_name["n1"].location) == (2, False, "FR/par9/z")
    assert not moves_between(before, after)
    assert places_digest(before) == places_digest(after)
    assert after.seeds == before.seeds
    for number in range(PARTITIONS):
        assert before.replicas_of(number) == after.replicas_of(number)
    for group in range(0, 4096, 64):
        data_id = (group << 4).to_bytes(2, "big") + bytes(14)
        assert first_choice(before, data_id, Profile(2, 1)) == first_choice(after, data_id, Profile(2, 1))


def test_no_node_refuses_another_whatever_layout_and_certificate_each_has(
    authority: Path, tmp_path: Path, capsys: SAID
) -> None:
    """Before, after and after a second rename, with certificates of each of these times."""
    from cryptography import x509

    from storaged.cluster.identity import identity_of

    layouts, certificates = [newest(authority)], []

    def certify() -> None:
        place = tmp_path / f"n1-{len(certificates)}"
        ticket = answered(capsys, "cluster", "renew", str(authority), "n1")["ticket"]
        call("node", "join", ticket, str(place))
        call("node", "sign", str(authority), str(place / joining.REQUEST_NAME))
        call("node", "join", ticket, str(place), str(authority / "nodes" / "n1" / joining.ANSWER_NAME))
        certificates.append(identity_of(x509.load_pem_x509_certificate((place / "identity" / "node.crt").read_bytes())))

    certify()
    for old, new in (("FR/par1/a", "FR/par1/z"), ("FR/par1/z", "FR/par2/y"), ("FR/par2/y", "FR/par1/a")):
        call("rack", "rename", str(authority), old, new)
        call("cluster", "layout", str(authority))
        layouts.append(newest(authority))
        certify()
    assert [layout.node_by_name["n1"].location for layout in layouts][1:] == ["FR/par1/z", "FR/par2/y", "FR/par1/a"]
    for layout, peer in product(layouts, certificates):
        where = f"{peer.country}/{peer.site}/{peer.rack}"
        assert confirmed_roles(layout, "n1", where, peer.roles) == {"storage"}
        assert not confirmed_roles(layout, "n1", "FR/par2/b", peer.roles)
    assert layouts[-1].node_by_name["n1"].certified == "", "it has its first name again"


def test_a_node_that_joins_a_renamed_rack_is_in_it(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    call("rack", "rename", str(authority), "FR/par1/a", "FR/par1/z")
    where = ("--rack", "FR/par1/z", "--address", "h:1", "--disk", "/d")
    ticket = answered(capsys, "node", "invite", str(authority), "n4", *where)["ticket"]
    call("node", "join", ticket, str(tmp_path / "n4"))
    call("node", "sign", str(authority), str(tmp_path / "n4" / joining.REQUEST_NAME))
    call("cluster", "layout", str(authority))
    after = newest(authority)
    entry = after.node_by_name["n4"]
    assert (entry.location, entry.certified) == ("FR/par1/z", "FR/par1/a")
    domains = {node.name: after.domain_by_disk[next(d.id for d in after.disks if d.node == node.name)]
               for node in after.nodes if "storage" in node.roles}  # fmt: skip
    assert domains == {"n1": "FR/par1/z", "n2": "FR/par2/b", "n3": "FR/lyo1/c", "n4": "FR/par1/z"}
    with pytest.raises(OperatorError, match="was renamed"):
        call("node", "invite", str(authority), "n5", "--rack", "FR/par1/a", "--address", "h:1", "--disk", "/d")
    call("cluster", "issue", str(authority), "n1", "--rack", "FR/par1/z", "--roles", "storage", "--address", "h:9")
    call("cluster", "layout", str(authority))
    assert not moves_between(after, newest(authority))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("FR/par9/z", "FR/par1/y", "no node is in rack FR/par9/z"),
        ("FR/par1/a", "FR/par2/b", "the name of another rack"),
        ("FR/par1/a", "DE/par1/a", "two countries"),
        ("FR/par1/a", "FR/par1", "is not COUNTRY"),
        ("FR/par1/a", "FR/par1/a", "has that name already"),
        ("FR/par2/b", "FR/old/o", "the name of another rack, or was it before: n3 is in FR/lyo1/c"),
    ],
)
def test_what_is_no_rename_is_refused_and_changes_nothing(authority: Path, old: str, new: str, said: str) -> None:
    plan = create.load_plan(authority)
    plan.nodes[2].certified = "FR/old/o"
    create.save_plan(authority, plan)
    before = (authority / "cluster.json").read_bytes()
    with pytest.raises(OperatorError, match=said):
        call("rack", "rename", str(authority), old, new)
    assert (authority / "cluster.json").read_bytes() == before


def test_no_other_change_of_racks_passes_for_a_rename() -> None:
    layout = first(("n1", "n2", "n3", "n4"))
    a, b = "FR/par1/n1", "FR/par1/n2"
    together = moved(layout, n2=(a, a))
    assert not moves_between(layout, moved(layout, n1=("FR/par1/z", a)))
    assert not moves_between(moved(layout, n1=("FR/par1/y", a)), moved(layout, n1=("FR/par1/z", a)))
    for before, after in (
        (layout, moved(layout, n1=("FR/par1/z", ""))),
        (layout, moved(layout, n1=(b, a))),
        (layout, moved(layout, n1=(b, a), n2=(b, a))),
        (together, moved(together, n2=("FR/par1/z", a))),
        (together, moved(together, n1=("FR/par1/y", a), n2=("FR/par1/z", a))),
        (layout, moved(layout, n1=("DE/par1/z", a))),
        (layout, moved(layout, n1=(b, a), n2=(a, b))),
    ):
        swapped = after.node_by_name["n1"].location == b and after.node_by_name["n2"].location == a
        assert bool(moves_between(before, after)) != swapped, "two racks that only change names move nothing"
        assert (places_digest(before) != places_digest(after)) != swapped


def test_a_rename_takes_no_node_to_another_country() -> None:
    layout = moved(first(), n1=("DE/par1/z", "FR/par1/n1"))
    assert not confirmed_roles(layout, "n1", "FR/par1/n1", ("storage",))
    assert not confirmed_roles(layout, "n1", "DE/par1/z", ("storage",))
