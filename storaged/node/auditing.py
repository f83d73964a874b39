"""A node's part in auditing: it shows its own log to its witnesses, and with disks it is a witness of other nodes'
logs.

A gateway's further processes write through the first one's log (``Leader``) and show nothing themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cryptography import x509

from storaged.clock import Clock
from storaged.cluster.audit.log import AuditLog
from storaged.cluster.audit.retention import prune_regularly
from storaged.cluster.audit.witness import WitnessBook, WitnessedReply, WitnessedRequest
from storaged.cluster.audit.witness_client import CALL_TIMEOUT_S, WitnessClient
from storaged.cluster.audit.witness_record import plain
from storaged.cluster.identity import Identity, NodeSigner
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import PEER, LayoutBook
from storaged.cluster.membership import Membership
from storaged.cluster.moves import RefusedLayout
from storaged.cluster.ports import Methods
from storaged.cluster.rpc import RpcPool
from storaged.config import Config
from storaged.errors import LayoutRefused, PeerError
from storaged.observe import Metrics
from storaged.units import MIB

if TYPE_CHECKING:  # a storage node has no further processes and does not import their code
    from storaged.node.leader import Leader

WITNESS_FOLDER = "witness"
PAGES_MAX = 512
ANSWER_BYTES_MAX = 128 * MIB
"""The bound of one witness's answer about one node: 16,384 chains are 50 MiB."""


class AuditedNode(Protocol):
    """The parts of a node that auditing uses. ``config`` and ``own`` change with a reload."""

    config: Config
    own: Identity
    clock: Clock
    metrics: Metrics
    leader: Leader | None
    incarnation: bytes
    directory: Path
    layouts: LayoutBook
    pool: RpcPool
    membership: Membership


class Auditing:
    """``log`` is usable at once. Register ``methods``, call ``start`` after the network starts and ``close`` before it
    closes.
    """

    def __init__(self, node: AuditedNode) -> None:
        self._node = node
        config, own = node.config, node.own
        self.log: AuditLog | Leader = node.leader or AuditLog(
            Path(config.audit.directory or node.directory / "audit"),
            own.name,
            node.incarnation,
            clock=node.clock,
            file_bytes_max=config.audit.file_bytes_max,
        )
        self._client: WitnessClient | None = None
        if isinstance(self.log, AuditLog):
            self._client = WitnessClient(self.log, NodeSigner(own), node.pool, self._witnesses)
        self._book: WitnessBook | None = None
        if config.storage and node.leader is None:
            authority = x509.load_pem_x509_certificate((own.directory / "authority.crt").read_bytes())
            self._book = WitnessBook(node.directory / WITNESS_FOLDER, authority, node.clock)
            self._book.trail = self.log

        if isinstance(log := self.log, AuditLog):
            node.metrics.gauge("storaged_audit_alarms").set_function(lambda: len(merged(self.alarms())))
            node.metrics.gauge("storaged_audit_entries").set_function(lambda: log.statistics().entries_durable)

    def methods(self) -> Methods:
        return self._book.methods() if self._book is not None else {}

    def work(self) -> list[Coroutine[Any, Any, None]]:
        if self._client is None or not isinstance(self.log, AuditLog):
            return []
        return [self._client.run(), prune_regularly(self.log, self._node.clock, self._node.config.audit.keep_days)]

    async def close(self) -> None:
        """Syncs the last entries and shows them to the witnesses that answer."""
        await self.log.close()
        if self._client is not None:
            await self._client.close()

    def renew(self, own: Identity) -> None:
        """Uses another certificate. Raises CertificateRefused and keeps the old one."""
        if self._client is not None:
            self._client.signer = NodeSigner(own)

    def _witnesses(self) -> list[str]:
        """The witnesses that answer now. A witness that was away gets the missed entries when it returns."""
        return [
            name
            for name in self._all_witnesses(self._node.own.name)
            if self._node.membership.status(name).state == "up"
        ]

    def _all_witnesses(self, of: str) -> list[str]:
        """Every node with disks except the log's own: a node is no witness of itself."""
        return [node.name for node in self._node.layouts.current.nodes if "storage" in node.roles and node.name != of]

    @property
    def problem(self) -> str:
        """Why the log can't be written now; empty when it can."""
        return self.log.problem if isinstance(self.log, AuditLog) else ""

    def alarms(self) -> list[tuple[str, str]]:
        """(node, what is wrong with its audit log), for this node's log and those that it witnesses."""
        own = self._client.problems() if self._client is not None else {}
        found = [(self._node.own.name, f"{witness}: {reason}") for witness, reason in own.items()]
        if self._book is not None:
            found += [(node, f"{self._node.own.name}: {reason}") for node, reason in self._book.alarms()]
        return found

    async def witnessed(self, of: str) -> list[dict[str, Any]]:
        """What each witness has of a node's log: ``name``, ``reachable``, ``reason``, and the ``lines`` of
        ``witness_record``.
        """
        return list(await asyncio.gather(*(self._ask(name, of) for name in self._all_witnesses(of))))

    def check(self) -> tuple[str, str]:
        """The check for ``doctor``: ``ok`` or ``warn``, and which witnesses saw this node's log."""
        if self._client is None:
            return "ok", ""
        witnesses, taken = self._all_witnesses(self._node.own.name), self._client.taken()
        if not witnesses:
            return "ok", "no other node has disks, so it has no witness"
        missing = [name for name in witnesses if name not in taken]
        if missing:
            return "warn", f"not shown to {', '.join(missing)} yet"
        return "ok", f"seen by {', '.join(witnesses)}"

    async def _ask(self, name: str, of: str) -> dict[str, Any]:
        lines: list[str] = []
        skip = size = 0
        try:
            for _ in range(PAGES_MAX):
                request = WitnessedRequest(of, skip)
                answer, body = await self._node.pool.call(
                    name, "audit.witnessed", request, WitnessedReply, timeout_s=CALL_TIMEOUT_S
                )
                lines += bytes(body).decode("utf-8", "replace").splitlines()
                size += len(body)
                skip = answer.next if size < ANSWER_BYTES_MAX else -1
                if skip < 0:
                    break
                if not skip:
                    return {"name": name, "reachable": True, "reason": "", "lines": lines}
        except PeerError as error:
            return {"name": name, "reachable": False, "reason": error.message, "lines": []}
        return {"name": name, "reachable": False, "reason": "it has more chains than can be read", "lines": []}


def merged(alarms: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One alarm a node, in order. A node and its witnesses report the same problem in different words."""
    found: dict[str, list[str]] = {}
    for node, reason in alarms:
        reasons = found.setdefault(plain(node), [])
        if (text := plain(reason)) not in reasons:
            reasons.append(text)
    return [(node, "; ".join(reasons)) for node, reasons in sorted(found.items())]


def audit_layouts(layouts: LayoutBook, audit: AuditLog | Leader) -> None:
    """Records the layouts that were refused, and those that will be taken or refused."""

    def taken(layout: Layout) -> None:
        audit.note("layout.taken", target=f"layout:{layout.epoch}", outcome="done", nodes=len(layout.nodes))

    def note(refused: RefusedLayout) -> None:
        audit.refused(
            "layout.refused",
            LayoutRefused.code,
            actor=f"node:{refused.source.removeprefix(PEER)}" if refused.source.startswith(PEER) else "",
            target=f"layout:{refused.epoch}",
            source=refused.source,
            reason=refused.reason,
        )

    layouts.watch(taken)
    layouts.on_refusal = note
    for refused in layouts.refusals():
        note(refused)
