"""Says which roles may call which RPC method, and why: one table, default deny. Pure.

A method without a row cannot be registered (``grant``). A node starts only when it has registered exactly the rows that
its roles serve (``check_registered``). ``FORMATS.md`` has the same table, which a test compares, and ``storaged cluster
methods`` prints it.

A peer has a role when both its certificate and the layout in force give it. A row without callers is open to no other
node: the method exists for the node's own code, and for a later version. A node with both roles may call what either
may.

A role opens a method. What is in a prepare, accept or create is judged by another table (``meta/authority.py``).

No row lets a storage node change a register, a fence or a key. What its background work needs changed, it asks of
gateways (``maintain.asks``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from storaged.cluster.ports import Method

GATEWAY: Final = frozenset({"gateway"})
STORAGE: Final = frozenset({"storage"})
BOTH: Final = GATEWAY | STORAGE
NO_ROLE: Final[frozenset[str]] = frozenset()


class Grant(NamedTuple):
    """One row of the table.

    ``callers``: roles, any of which may call. ``served_by``: roles of the nodes that register it. ``why``: what each
    caller needs it for. ``harm``: what a hostile storage node can do with it; empty where it can do no more than its
    own disks let it do anyway. ``non_members``: a certified node that the layout in force does not name (not yet, or no
    longer) may call it too.
    """

    callers: frozenset[str]
    served_by: frozenset[str]
    why: str
    harm: str = ""
    non_members: bool = False


METHODS: Final[Mapping[str, Grant]] = {
    "cluster.ping": Grant(BOTH, BOTH, "heartbeats", non_members=True),
    "cluster.layout": Grant(BOTH, BOTH, "layouts spread; each is signed", non_members=True),
    "cluster.offer": Grant(BOTH, BOTH, "layouts spread; each is signed", non_members=True),
    "cluster.accept": Grant(GATEWAY, STORAGE, "a gateway collects the acceptances of a layout that moves data"),
    "cluster.vote": Grant(GATEWAY, STORAGE, "a gateway collects signed votes on disks that are away, or are back"),
    "cluster.claims": Grant(
        STORAGE,
        STORAGE,
        "ledgers remember the disks of all nodes; each statement is signed by the disks' own node",
        "forgets the statements: a disk that was put back counts where a majority is needed from it",
    ),
    "audit.witness": Grant(
        BOTH,
        STORAGE,
        "a node shows checkpoints of its own audit log, and of no other's",
        "fills disks with up to 16,384 chains of its own log",
    ),
    "audit.witnessed": Grant(BOTH, STORAGE, "a node asks which entries to show; `storaged audit verify`"),
    "meta.prepare": Grant(GATEWAY, STORAGE, "every change and every settling round"),
    "meta.accept": Grant(GATEWAY, STORAGE, "every change and every settling round"),
    "meta.accepts": Grant(GATEWAY, STORAGE, "many accepts in one message"),
    "meta.create": Grant(GATEWAY, STORAGE, "a PUT of a new key in one round"),
    "meta.read": Grant(BOTH, STORAGE, "every read", "reads every record as it is stored: names, sizes, times, users"),
    "meta.reads": Grant(BOTH, STORAGE, "many reads in one message", "as meta.read"),
    "meta.scan": Grant(BOTH, STORAGE, "listings; walks of repair and catch-up", "as meta.read"),
    "meta.turn": Grant(GATEWAY, STORAGE, "processes that compete for one key change it in turns"),
    "meta.page_put": Grant(BOTH, STORAGE, "long manifests; repair copies their pages", "fills disks with pages"),
    "meta.page_get": Grant(BOTH, STORAGE, "long manifests", "as meta.read"),
    "meta.page_check": Grant(BOTH, STORAGE, "repair and moves of partitions check which pages a replica lacks"),
    "meta.fence": Grant(GATEWAY, STORAGE, "deletion of a bucket"),
    "meta.unfence": Grant(GATEWAY, STORAGE, "deletion of a bucket that was not empty"),
    "meta.fences": Grant(GATEWAY, STORAGE, "a partition moves: the replica that comes gets the fences of the others"),
    "meta.take_fences": Grant(GATEWAY, STORAGE, "a partition moves: the replica that comes takes them"),
    "meta.ranges": Grant(GATEWAY, STORAGE, "a partition moves: which shards have rows"),
    "meta.floor": Grant(GATEWAY, STORAGE, "deleted keys are expunged: all replicas of a range get a floor first"),
    "meta.expunge": Grant(GATEWAY, STORAGE, "deleted keys are expunged below a floor"),
    "meta.floors": Grant(GATEWAY, STORAGE, "a partition moves: the replica that comes gets the floors of the others"),
    "meta.take_floors": Grant(GATEWAY, STORAGE, "a partition moves: the replica that comes takes them"),
    "meta.fence_epoch": Grant(GATEWAY, STORAGE, "a partition moves: its replicas refuse its earlier steps"),
    "fragment.write": Grant(
        BOTH,
        STORAGE,
        "PUT; repair rebuilds and recodes",
        "fills disks; puts false bytes where a disk has lost a fragment",
    ),
    "fragment.sync": Grant(
        BOTH, STORAGE, "the barrier of a PUT, and of a recoding", "keeps garbage from being collected"
    ),
    "fragment.read": Grant(BOTH, STORAGE, "GET; repair reads survivors", "reads sealed bytes"),
    "fragment.reads": Grant(GATEWAY, STORAGE, "GET: reads of several of a node's disks"),
    "fragment.stat": Grant(BOTH, STORAGE, "`where`; walks of repair, collection"),
    "fragment.headers": Grant(GATEWAY, STORAGE, "a gateway verifies fragments before it names their new places"),
    "fragment.touch": Grant(GATEWAY, STORAGE, "a proposal that begins again; a move of blocks"),
    "fragment.retire": Grant(GATEWAY, STORAGE, "a change puts what it replaced on the garbage list"),
    "fragment.retired": Grant(GATEWAY, STORAGE, "a deleted bucket's key is destroyed once no disk has garbage of it"),
    "fragment.unretire": Grant(NO_ROLE, STORAGE, "a node collects on its own disks"),
    "fragment.delete": Grant(GATEWAY, STORAGE, "a PUT that moves a block elsewhere"),
    "fragment.scan": Grant(NO_ROLE, STORAGE, "a node walks its own disks"),
    "fragment.verify": Grant(NO_ROLE, STORAGE, "a node scrubs its own disks"),
    "fragment.usage": Grant(NO_ROLE, STORAGE, "a node counts its own disks"),
    "maintain.status": Grant(BOTH, STORAGE, "`storaged status`, `storaged repair`, on any node"),
    "maintain.scrub": Grant(BOTH, STORAGE, "`storaged scrub`, on any node", "makes other nodes read all their disks"),
    "maintain.hint": Grant(
        BOTH,
        STORAGE,
        "a node reports damage to the node that repairs it",
        "makes another node check any object",
    ),
    "maintain.hold": Grant(GATEWAY, STORAGE, "a download that lasts long keeps what it reads from being collected"),
    "maintain.behind": Grant(
        STORAGE,
        STORAGE,
        "catch-up: a disk of the asked node lags with these registers",
        "makes another node look at them",
    ),
    "maintain.asks": Grant(GATEWAY, STORAGE, "a gateway fetches what a storage node asks, and hands in its answers"),
    "maintain.wake": Grant(
        STORAGE, STORAGE, "a node reports its start, or damage", "makes another node walk its records again"
    ),
}


def grant(methods: Mapping[str, Method]) -> dict[str, Method]:
    """Returns the methods with the callers that their rows grant. Raises LookupError for one without a row."""
    if unknown := sorted(methods.keys() - METHODS.keys()):
        raise LookupError(f"no row in the table of cluster/rpc/authority.py: {', '.join(unknown)}")
    return {
        name: method._replace(roles=METHODS[name].callers, for_non_members=METHODS[name].non_members)
        for name, method in methods.items()
    }


def check_registered(methods: Mapping[str, Method], roles: Iterable[str]) -> None:
    """Checks that a node of these roles serves exactly the table's methods. Raises LookupError with the differences."""
    wanted = {name for name, row in METHODS.items() if not row.served_by.isdisjoint(roles)}
    problems = [f"{name} is in the table and not registered" for name in sorted(wanted - methods.keys())]
    problems += [f"{name} is registered and not for a node of these roles" for name in sorted(methods.keys() - wanted)]
    for name in sorted(wanted & methods.keys()):
        row = METHODS[name]
        if (methods[name].roles, methods[name].for_non_members) != (row.callers, row.non_members):
            problems.append(f"{name} grants something else than its row")
    if problems:
        raise LookupError("; ".join(problems))


def callers_of(row: Grant) -> str:
    """``gateway, storage``, with ``, any node`` where non-members may call too, or ``none``."""
    return ", ".join([*sorted(row.callers), *(["any node"] if row.non_members else [])]) or "none"


def document() -> list[str]:
    """The table as FORMATS.md has it, line by line."""
    lines = ["| method | callers | what for | what a hostile storage node can do with it |", "|---|---|---|---|"]
    return lines + [f"| `{name}` | {callers_of(row)} | {row.why} | {row.harm} |" for name, row in METHODS.items()]
