"""The table of RPC methods and roles: what is registered, documented, and started with is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from storaged.cli.cluster import cluster as cluster_command
from storaged.cluster.audit.witness import WitnessBook
from storaged.cluster.identity import Identity
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.membership import Membership, OwnNode
from storaged.cluster.ports import Method, Methods
from storaged.cluster.rpc import authority
from storaged.errors import PeerRefused, StoragedError
from storaged.fragments.remote import FragmentHost
from storaged.meta import authority as authority_of_contents
from storaged.meta.transport.replicas import ReplicaHost
from storaged.node.accepting import LayoutAcceptor
from storaged.node.ledger import Ledger
from storaged.node.ledger_exchange import LedgerExchange
from storaged.node.sparing import Voter
from tests.doubles.layouts import KnownLayouts
from tests.integration.memory_cluster import Cluster, run
from tests.worlds.authority import Note, Service, World, pooled, serving

FORMATS = Path(authority.__file__).parents[2] / "FORMATS.md"


def ledger_exchange(world: World, own: Identity) -> LedgerExchange:
    layout = Layout(own.cluster, 1, (), (), ())
    return LedgerExchange(Ledger(world.directory), own, world.authority.certificate, KnownLayouts(layout), None)  # type: ignore[arg-type]  # no disks


def of_a_storage_node(world: World) -> Methods:
    """As ``node.planes`` registers them."""
    found: dict[str, Method] = {}

    async def build(cluster: Cluster) -> None:
        own = world.node("n1")
        membership = Membership(OwnNode("n1", bytes(8)), None, LayoutBook(own.administration, own.cluster))  # type: ignore[arg-type]  # no node is called
        found.update(membership.methods())
        found.update(ledger_exchange(world, own).methods())
        found.update(LayoutAcceptor(own, None, None, world.directory).methods())  # type: ignore[arg-type]  # not called
        found.update(Voter(lambda: own, membership._layouts, None).methods())  # type: ignore[arg-type]  # not called
        found.update(cluster.nodes["na"].maintenance.methods())

    run(build)
    book = WitnessBook(world.directory / "witness", world.authority.certificate)
    return {**found, **ReplicaHost({}, lambda: 1).methods(), **FragmentHost({}).methods(), **book.methods()}


def test_a_storage_node_registers_exactly_the_rows_of_the_table(tmp_path: Path) -> None:
    methods = of_a_storage_node(World(tmp_path))
    authority.check_registered(methods, ("storage",))
    authority.check_registered(methods, ("storage", "gateway"))
    assert set(methods) == set(authority.METHODS)


def test_a_gateway_without_disks_serves_heartbeats_and_layouts_alone(tmp_path: Path) -> None:
    served = {name for name, row in authority.METHODS.items() if "gateway" in row.served_by}
    methods = {name: method for name, method in of_a_storage_node(World(tmp_path)).items() if name in served}
    authority.check_registered(methods, ("gateway",))
    for name in methods:
        with pytest.raises(LookupError, match=name):
            authority.check_registered({other: methods[other] for other in methods if other != name}, ("gateway",))


def test_a_method_without_a_row_can_not_be_registered() -> None:
    with pytest.raises(LookupError, match=r"no row .*: meta\.everything"):
        authority.grant({"meta.everything": Method(Note, Service().echo)})


def test_a_row_without_its_method_a_method_beyond_the_role_and_other_roles_are_each_refused(tmp_path: Path) -> None:
    methods = dict(of_a_storage_node(World(tmp_path)))
    missing = {name: method for name, method in methods.items() if name != "meta.fence"}
    with pytest.raises(LookupError, match=r"meta\.fence is in the table and not registered"):
        authority.check_registered(missing, ("storage",))
    with pytest.raises(LookupError, match=r"meta\.fence is registered and not for a node of these roles"):
        authority.check_registered(methods, ("gateway",))
    methods["meta.fence"] = methods["meta.fence"]._replace(roles=authority.BOTH)
    with pytest.raises(LookupError, match=r"meta\.fence grants something else"):
        authority.check_registered(methods, ("storage",))


async def test_a_method_that_names_no_roles_is_answered_to_nobody(tmp_path: Path) -> None:
    world, refused = World(tmp_path), list[tuple[str, str]]()

    def note(peer: str, error: StoragedError) -> None:
        refused.append((peer, getattr(error, "remote_code", "")))

    async with (
        serving(world.node("n1"), {"t.bare": Method(Note, Service().echo)}, on_refusal=note) as server,
        pooled(world.node("gw", ("gateway", "storage")), {"n1": f"127.0.0.1:{server.port}"}) as pool,
    ):
        with pytest.raises(PeerRefused, match=r"t\.bare is for no one"):
            await pool.call("n1", "t.bare", Note(""), Note)
        assert refused == [("gw", "ROLE_REFUSED")], "and it is told, for the audit log"


def test_the_formats_document_has_the_same_table() -> None:
    section = FORMATS.read_text().split("\n## Frames between nodes\n")[1].split("\n## ")[0]
    lines = [
        line
        for line in section.splitlines()
        if line.startswith(("| method |", "| `meta.", "| `fragment.", "| `maintain.", "| `cluster.", "| `audit."))
    ]
    assert lines == [line for line in authority.document() if not line.startswith("|---")]
    assert all(line in section for line in authority_of_contents.document())


def test_the_command_prints_every_row_for_people_and_for_programs() -> None:
    told = CliRunner().invoke(cluster_command, ["methods"])
    assert told.exit_code == 0
    assert all(name in told.output and row.why in told.output for name, row in authority.METHODS.items())
    rows = json.loads(CliRunner().invoke(cluster_command, ["methods", "--json"]).output)["methods"]
    assert [row["method"] for row in rows] == list(authority.METHODS)
    fence = next(row for row in rows if row["method"] == "meta.fence")
    assert (fence["callers"], fence["any_certified_node"]) == (["gateway"], False)


def test_no_row_lets_a_storage_node_change_a_register_or_a_fence() -> None:
    changing = {"meta.prepare", "meta.accept", "meta.accepts", "meta.create", "meta.fence", "meta.unfence"}
    assert {name: authority.METHODS[name].callers for name in changing} == dict.fromkeys(changing, authority.GATEWAY)


def test_what_a_storage_node_can_do_no_harm_with_is_not_marked_and_the_rest_is() -> None:
    """A row that opens to storage nodes either says what one of them can break, or only asks."""
    harmless = {"audit.witnessed", "meta.page_check", "fragment.sync", "fragment.stat", "maintain.status"}
    for name, row in authority.METHODS.items():
        if "storage" in row.callers and not row.non_members and name not in harmless:
            assert row.harm, name
        if "storage" not in row.callers:
            assert not row.harm, name
