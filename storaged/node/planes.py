"""The planes of every node, from the bottom up: layouts, disks, network, ring, maintenance.

No key is here: a storage node never imports the key plane. ``node`` adds what a gateway has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from storaged import __version__, observe
from storaged.clock import Clock
from storaged.cluster.identity import Identity, authority_of, load_identity
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook, LayoutFiles
from storaged.cluster.membership import Membership, OwnNode
from storaged.cluster.moves import places_digest
from storaged.cluster.ports import DiskStatus, Method, PeerChecks
from storaged.cluster.rpc import RpcPool, RpcServer, ServerLimits, authority
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.signers import Signers
from storaged.config import Config, split_address
from storaged.errors import ConfigInvalid, DiskUnusable, LayoutRefused, PortInUse, StoragedError
from storaged.fragments.payloads import header_at_position
from storaged.fragments.ports import FragmentId
from storaged.fragments.remote import FragmentHost, StoreDirectory
from storaged.ids import INCARNATION_BYTES, system_entropy
from storaged.maintain.asks import Asks
from storaged.maintain.context import MaintainContext, MaintainLimits
from storaged.maintain.service import MaintainClient, Maintenance
from storaged.meta.client import RingClient, RingHooks, RingSettings
from storaged.meta.listing.cache import CACHE_BYTES_MAX
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.transport.replicas import ReplicaDirectory, ReplicaHost
from storaged.node.accepting import LayoutAcceptor
from storaged.node.auditing import Auditing, audit_layouts
from storaged.node.belief import NodeBelief
from storaged.node.disks import Disks, Snapshot
from storaged.node.gauges import set_disk_gauges, set_ring_gauges
from storaged.node.keeper import SystemKeeper
from storaged.node.ledger import Ledger
from storaged.node.ledger_exchange import LedgerExchange
from storaged.node.opener import Opener, place_in
from storaged.node.partition_follower import PartitionFollower, known_steps
from storaged.node.peers import PeerRules
from storaged.node.recovering import SystemRecovery
from storaged.node.refusals import Refusals
from storaged.node.sparing import NodeSparing
from storaged.node.system import SystemPaths, digests_of, learn_operators
from storaged.node.system_move import SystemMove
from storaged.objects.code.adding import overtake
from storaged.objects.code.small_copy import is_small_copy
from storaged.wire import decode

if TYPE_CHECKING:  # storage nodes have no further processes, and don't import what those need
    from storaged.node.leader import Leader

DISK_STATUS_EVERY_S = 0.5
FIXED = ("node", "disks", "rpc", "admin", "limits")

log = structlog.get_logger("node")


class GatewaySide(Protocol):
    """What the planes ask of a gateway that is built over them."""

    def judge_keys(self) -> None:
        """Asks the policy again for every key: the layout or the certificate changed."""

    def believes(self, name: RegisterName, value: Value) -> bool:
        """Whether a gateway wrote this value of the system table."""

    def bucket_fenced(self, bucket_id: bytes) -> None:
        """A replica reports that this bucket is, or was, being deleted."""

    def reload(self, config: Config) -> None:
        """Raises ConfigInvalid and keeps what it had."""


class NodePlanes:
    """The planes of every node. ``open`` builds and starts them, ``work`` returns their tasks.

    What ``open`` started is closed by the exit stack, in reverse order. More attributes than elsewhere: one for each
    plane, as the gateway and the reports are built from them.
    """

    gateway: GatewaySide | None = None

    def __init__(self, config: Config, own: Identity, clock: Clock, leader: Leader | None = None) -> None:
        """``leader``: the first process of the gateway, where this one is a further worker of it."""
        self.config = config
        self.own = own
        self.authority = authority_of(own)
        self.clock = clock
        self.metrics = observe.Metrics()
        self.leader = leader
        self.incarnation = system_entropy(INCARNATION_BYTES)
        self.directory = Path(config.node.directory)
        self.disks = Disks()
        self.ledgers: LedgerExchange | None = None
        self.acceptor: LayoutAcceptor | None = None
        """Both of a storage node."""
        self._opener: Opener | None = None
        self._exchanging: asyncio.Task[None] | None = None
        self.maintenance: Maintenance | None = None
        self.asks = Asks(clock, structlog.get_logger("maintain").info)
        """What this node asks of gateways, where it has disks."""
        self._disk_statuses: Sequence[DiskStatus] = ()
        self._methods: dict[str, Method] = {}
        self._refused = Refusals(clock, lambda: self.audit)
        self._server: RpcServer | None = None
        self.metrics.gauge("storaged_info").labels(config.node.name, __version__, ",".join(config.node.roles)).set(1)

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Nothing is open after PortInUse, DirectoryInUse, LayoutRefused, ConfigInvalid or CertificateRefused."""
        await self._open_layouts()
        await self._build_disks(stack)
        self._build_network()
        self._build_ring()
        if self.config.storage:
            self._build_maintenance()
        stack.push_async_callback(self._close_network)
        await self.pool.start()
        if self.config.rpc.listen:
            await self._listen()
        await self.membership.start()
        await self._open_disks()
        await self.audit.start()
        audit_layouts(self.layouts, self.audit)
        stack.push_async_callback(self.auditing.close)

    async def _build_disks(self, stack: contextlib.AsyncExitStack) -> None:
        if not self.config.storage:
            return
        ledger = await asyncio.to_thread(Ledger, self.directory)
        if not await asyncio.to_thread(ledger.goes_by, *digests_of(self.layouts)):
            raise LayoutRefused(
                f"By layout {self.layouts.epoch} replicas or disks lie elsewhere than by the one that this node has"
                f" used, and which is gone from {self.directory / 'layouts'}. Put its files layout-*.signed back, or"
                " copy those of another node: they are as good."
            )
        self._opener = opener = Opener(
            self.config,
            self.clock,
            self._cell_damaged,
            ledger,
            cluster=self.own.cluster,
            place_of=lambda disk: place_in(self.layouts, self.own.name, disk),
        )
        self.disks = opener.disks
        self.ledgers = opener.ledgers = LedgerExchange(
            ledger, self.own, self.authority, self.layouts, opener, self._refused
        )
        self.layouts.watch(self.ledgers.follow)
        self.layouts.watch(lambda _layout: opener.follow())
        self._methods.update(self.ledgers.methods())
        stack.push_async_callback(opener.close)

    async def _open_disks(self) -> None:
        """Needs the network: what the other nodes' ledgers know comes first."""
        if self._opener is not None and self.ledgers is not None:
            ledgers = self.ledgers
            self.membership.watch(lambda node: ledgers.on_node(node.name, node.state == "up", node.incarnation))
            self._exchanging = asyncio.get_running_loop().create_task(ledgers.run(self.pool))
            await self._opener.open()
        await self._tell_disks()

    async def _open_layouts(self) -> None:
        self._files = files = LayoutFiles(self.directory / "layouts")
        persist = self._persist if self.leader is None else None
        self.layouts = LayoutBook(
            self.own.administration,
            self.own.cluster,
            known=files.load(),
            persist=persist,
            clock=self.clock,
            authority=self.authority,
        )
        await learn_operators(self.own, self.layouts)
        await asyncio.to_thread(self.layouts.prepare, self.layouts.current)
        self.peers = PeerRules(lambda: self.own.peer, self.layouts)
        self.layouts.watch(self._follow_policy)
        self.layouts.watch_revocations(self._recheck_peers)

    async def _persist(self, epoch: int, signed: SignedLayout) -> None:
        """A ``Persist``. The ledger then knows which layout this node has used, whatever becomes of the files. Raises
        DiskUnusable, and the layout is offered again.
        """
        layout = decode(signed.payload, Layout)
        try:
            await self._files.save(epoch, signed)
            if self.ledgers is not None and epoch > self.layouts.epoch and layout.base:
                await asyncio.to_thread(self.ledgers.ledger.move_to, places_digest(layout))
        except OSError as error:
            raise DiskUnusable(f"{self.own.name} can't keep layout {epoch} in {self.directory}: {error}") from None

    def _follow_policy(self, layout: Layout) -> None:
        """Takes over the policy of the layout in force: whom it admits, and who gets keys.

        Raises JurisdictionRefused for a policy that names a country outside EU law; then no peer is admitted.
        """
        try:
            self.peers.follow(layout)
        finally:
            if self.gateway is not None:
                self.gateway.judge_keys()
        if self._server is not None:
            self._server.recheck_peers()

    def _recheck_peers(self) -> None:
        """Ends connections with certificates that are revoked now; a gateway with such a one gets no more keys."""
        if self._server is not None:
            self._server.recheck_peers()
        self.pool.recheck_peers(self.peers.check_revoked)
        if self.gateway is not None:
            self.gateway.judge_keys()

    # --- building

    def _build_network(self) -> None:
        self.pool = RpcPool(
            self.own,
            addresses=self._address,
            checks=PeerChecks(self.peers.admit_dialled, on_refusal=self._refused, on_revoked=self.peers.on_revoked),
            local_methods=self._methods,
            incarnation=self.incarnation,
            clock=self.clock,
        )
        self.pool.watch(self.peers.on_attempt)
        leader = self.leader
        own = OwnNode(
            self.own.name,
            leader.incarnation if leader is not None else self.incarnation,
            leader.pid if leader is not None else os.getpid(),
            disks=lambda: self._disk_statuses,
            certificate_until_ms=lambda: int(self.own.expires.timestamp() * 1000),
        )
        self.membership = Membership(own, self.pool, self.layouts, links=self.pool, clock=self.clock)
        self._methods.update(self.membership.methods())

    def _address(self, node: str) -> str | None:
        entry = self.layouts.contact(node)
        return entry.address if entry is not None and entry.address else None

    def _build_ring(self) -> None:
        self.compared_at: Callable[[], float] = lambda: -inf
        replicas, fragments = self.disks.replicas, self.disks.fragments
        if self.config.storage:
            steps = known_steps(self.layouts, self.own.name, lambda: self.follower)
            host = ReplicaHost(replicas, lambda: self.layouts.epoch, on_refusal=self._refused, steps=steps)
            self._methods.update(host.methods())
            self.compared_at = lambda: host.compared_at
            self._methods.update(FragmentHost(fragments, self._fragment_contested).methods())
        directory = ReplicaDirectory(self.layouts, self.pool, replicas, node=self.own.name)
        self.belief = NodeBelief(self.own, self.authority, self._others_believe)
        self.ring = RingClient(
            self.layouts,
            directory,
            RingSettings(self.own.name, self.config.gateway),
            RingHooks(
                believes=self.belief,
                on_missed=self._missed,
                on_fenced=self._fenced,
                copy_at=header_at_position,
                ask_to_settle=self.asks.settle,
                is_copy=is_small_copy,
                refresh=lambda partition: self.follower.refresh(partition),
                overtake=overtake,
            ),
            clock=self.clock,
            seen=self.membership.view.seen,
        )
        self.scanner = RingScanner(
            self.layouts,
            directory,
            self.ring,
            self.membership,
            ScanSettings(cache_bytes_max=CACHE_BYTES_MAX // self.config.s3.workers),
            on_fenced=self._fenced,
            refresh=lambda partition: self.follower.refresh(partition),
        )
        self.keeper = SystemKeeper(self.scanner, self.ring, self.layouts, self.membership, walks=self.leader is None)
        self.stores = StoreDirectory(self.layouts, self.pool, fragments)
        self.paths = SystemPaths(self.ring)
        self.signers = Signers(self.paths.read, self.authority, self.own.cluster)
        self.follower = PartitionFollower(self.layouts, self.ring, self.scanner, self.signers.key, self.own.cluster)
        self.layouts.watch(lambda _layout: self.follower.wake())
        if self.config.storage:
            self.acceptor = LayoutAcceptor(self.own, self.layouts, self.paths, self.directory / "layouts")
            self.acceptor.may_settle = SystemMove(self.layouts, self.own.name, replicas, self.scanner).may_settle
            recovery = SystemRecovery(self.layouts, self.own.name, replicas, self.membership, self.paths.read)
            self.acceptor.may_recover = recovery.may_recover
            self._methods.update(self.acceptor.methods())
        self.maintain = MaintainClient(self.pool, self.layouts, self.membership)
        self.auditing = Auditing(self)
        self.audit = self.auditing.log
        self.sparing = NodeSparing(self)
        self._methods.update(dict(self.auditing.methods()) | dict(self.sparing.methods()))

    def maintain_context(self) -> MaintainContext:
        """What background work uses, of this node's disks and as a gateway."""
        return MaintainContext(
            node=self.own.name,
            clock=self.clock,
            layouts=self.layouts,
            liveness=self.membership,
            registers=self.ring,
            look=self.ring.look,
            pages=self.ring,
            scanner=self.scanner,
            stores=self.stores,
            local_meta=Snapshot(self.disks.metas),
            local_fragments=Snapshot(self.disks.fragments),
            signers=self.signers,
            asks=self.asks,
            adopt=lambda disk, request, copy: self.disks.used[disk].replica.accept(request, copy),
            small_copies=self.ring.small_copies,
            steps=lambda: self.layouts.partitions.steps,
            compared_at=self.compared_at,
            why_away=self.membership.why_away,
            reports=self.membership.reports,
            settings=lambda: self.follower.settings.current,
            audit_alarms=self.auditing.alarms,
            unwritable=lambda: (self.ledgers.ledger.problem if self.ledgers else "") or self.auditing.problem,
            on_refusal=self._refused,
            limits=MaintainLimits(
                recode_delay_s=self.config.limits.recode_delay_s,
                drop_delay_s=self.config.limits.drop_delay_s,
                read_hold_s=self.config.limits.read_hold_s,
            ),
            log=structlog.get_logger("maintain").info,
        )

    def _build_maintenance(self) -> None:
        self.maintenance = Maintenance(self.maintain_context(), self.scanner, self.pool)
        self._methods.update(self.maintenance.methods())

    async def _listen(self) -> None:
        host, port = split_address(self.config.rpc.listen)
        authority.check_registered(self._methods, self.config.node.roles)
        self._server = RpcServer(
            self.own,
            self._methods,
            checks=PeerChecks(self.peers.admit, self.peers.roles_of, self._refused),
            incarnation=self.incarnation,
            limits=ServerLimits(inflight_bytes_max=self.config.limits.rpc_inflight_bytes_max),
            clock=self.clock,
        )
        try:
            await self._server.start(host, port)
        except PortInUse:
            raise
        except OSError as error:
            raise ConfigInvalid(f"rpc.listen {self.config.rpc.listen}: {error.strerror or error}") from None

    # --- running

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """The tasks that run until the node stops."""
        found = [self._keep_telling_disks(), self.follower.run(), self.follower.settings.run()]
        found += [*self.auditing.work(), *self.sparing.work()]
        if self.maintenance is not None:
            found.append(self.maintenance.run())
        return found

    async def reload(self, config: Config) -> None:
        """Takes over what can change at run time: log level, TLS certificates, this node's certificate, a newer layout
        beside it.

        Logs the sections that need a restart. Raises, and changes nothing, for what does not load.
        """
        own = load_identity(Path(config.cluster.identity))
        if (own.name, own.cluster) != (self.own.name, self.own.cluster):
            raise ConfigInvalid(
                f"the certificate in {config.cluster.identity} is {own.name}'s of {own.cluster}; a node does not change"
                " its name while it runs"
            )
        if self.gateway is not None:
            self.gateway.reload(config)
        self.pool.renew(own)
        self.auditing.renew(own)
        if self.ledgers is not None and self.acceptor is not None:
            self.ledgers.renew(own)
            self.acceptor.renew(own)
        if self._server is not None:
            self._server.renew(own)
        worker = {"worker": str(self.leader.number)} if self.leader is not None else {}
        observe.setup_logging(config.log.level, config.log.format, stream=None, node=config.node.name, **worker)
        fixed = [name for name in FIXED if getattr(config, name) != getattr(self.config, name)]
        if (config.s3.listen, config.s3.workers) != (self.config.s3.listen, self.config.s3.workers):
            fixed.append("s3")
        if fixed:
            log.warning("some changes need a restart", sections=",".join(fixed))
        renewed = own.expires != self.own.expires
        self.config, self.own = config, own
        if renewed:
            log.info("this node presents a new certificate", expires=own.expires.isoformat())
        if self.gateway is not None:
            self.gateway.judge_keys()
        await learn_operators(self.own, self.layouts)

    async def _close_network(self) -> None:
        if self._exchanging is not None:
            self._exchanging.cancel()
            await asyncio.gather(self._exchanging, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
        await self.membership.close()
        await self.ring.close()
        await self.pool.close()

    async def _keep_telling_disks(self) -> None:
        changed = asyncio.Event()
        self.disks.on_change = changed.set
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DISK_STATUS_EVERY_S):
                    await changed.wait()
            changed.clear()
            await self._tell_disks()

    async def _tell_disks(self) -> None:
        """Updates the disk states that heartbeats carry, and the metrics of disks."""
        try:
            self._disk_statuses = await self.disks.statuses()
        except StoragedError as error:
            log.warning("cannot read the state of the disks", reason=error.message)
            return
        self.membership.look_at_disks()
        self.metrics.gauge("storaged_layout_epoch").set(self.layouts.epoch)
        if self._server is not None or self.gateway is not None:
            up = self.metrics.gauge("storaged_node_up")
            for known in self.membership.statuses():
                up.labels(known.name).set(known.state == "up")
        set_disk_gauges(self.metrics, self._disk_statuses, self.disks)
        set_ring_gauges(self.metrics, self.ring)

    def _cell_damaged(self, disk: str, fragment: FragmentId, cell: int) -> None:
        """A local disk reports a damaged cell. The node that looks after the owner register, named in the fragment's
        header, repairs it.
        """
        self.metrics.counter("storaged_fragments_damaged_total").labels(disk).inc()
        where = {
            "data_id": fragment.data_id.hex(),
            "block": fragment.block,
            "position": fragment.position,
            "cell": cell,
        }
        log.warning("a cell's checksum does not hold", disk=disk, **where)
        if self.maintenance is not None:
            self.maintenance.cell_damaged(disk, fragment)

    def _fragment_contested(self, owner: bytes, fragment: FragmentId) -> None:
        if self.maintenance is not None:
            self.maintenance.fragment_contested(owner, fragment)

    def _fenced(self, scope: bytes) -> None:
        """A replica reports that a bucket is, or was, being deleted: the gateway's cached record of
        it may be outdated.
        """
        if self.gateway is not None:
            self.gateway.bucket_fenced(scope)

    def _others_believe(self, name: RegisterName, value: Value) -> bool:
        return self.gateway is None or self.gateway.believes(name, value)

    def _missed(self, name: RegisterName) -> None:
        """A replica missed a write. The node that looks after the register brings it up to date."""
        if name.table == Table.SYSTEM:
            self.keeper.hint(name)
        elif self.config.gateway:
            self.maintain.hint(name)
        elif self.maintenance is not None:
            self.maintenance.hint(name.pack())
