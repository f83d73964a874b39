"""The planes that only a gateway has: keys, sealing, the S3 front. A storage node never imports this module.

The S3 port opens at once. Requests that need a key are answered with 503 until the keyring is open and the register
``cluster`` names it (``unlock``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import ssl
from collections.abc import Coroutine, Mapping
from typing import Any

import structlog

from storaged import keys
from storaged.admin.ports import Services
from storaged.admin.status import KeyDamage
from storaged.admin.where import where_document
from storaged.cluster.audit.format import REFUSED
from storaged.cluster.identity import NodeSigner
from storaged.cluster.policy import KeyHolder, Policy
from storaged.cluster.signers import publish, signer_id
from storaged.config import Config, split_address
from storaged.errors import (
    AuditUnwritable,
    CertificateRefused,
    ConfigInvalid,
    KeyringUnavailable,
    ServiceUnavailable,
)
from storaged.ids import system_entropy
from storaged.keys import CopyLog
from storaged.keys.ports import KeyCopies
from storaged.maintain.answers import Answers, divide_handler, loans_handler, settle_handler
from storaged.maintain.discard import Discarder
from storaged.maintain.mover import Mover, MoverStatistics
from storaged.meta.names import RegisterName, Value
from storaged.node.audited import NOT_AUDITED, AuditedBuckets, AuditedUsers, Recorder
from storaged.node.binding import REMEMBERED_FILE, Binding
from storaged.node.destinations import ConfiguredDestinations
from storaged.node.housekeeping import housekeep, look_at_records
from storaged.node.keyhome import EXPIRED_EVERY_S, CopiesDesk, FirstCopies, LeaderCopies, RingRegisters, take_restored
from storaged.node.lifecycle_duty import LifecycleDuty, agreed_time
from storaged.node.partition_duty import PartitionDuty
from storaged.node.planes import NodePlanes
from storaged.node.quotas import quotas_of, set_account_quota, set_bucket_copies, set_bucket_quota
from storaged.node.requestlog import RequestLog
from storaged.node.shares import endpoint_of, shared_out
from storaged.node.unlock import RETRY_MAX_S, LateKeys, Unlocker, backup
from storaged.node.version_services import offer_versions
from storaged.node.workers import FirstProcess, Workers
from storaged.objects.bad_rows import BadRow
from storaged.objects.event_delivery import EventDelivery
from storaged.objects.lifecycle.report import describe
from storaged.objects.plane import Damage, ObjectLimits, ObjectPlane
from storaged.objects.service import ObjectService
from storaged.objects.system.belief import Belief
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.claims import authenticate_all
from storaged.objects.system.keyends import Ends
from storaged.objects.system.shards import domains_inside
from storaged.objects.system.users import UserService
from storaged.objects.usage import usage_after
from storaged.objects.where import where
from storaged.objects.write.departures import end_old
from storaged.objects.write.divide import divide
from storaged.s3.app import S3App
from storaged.s3.inventories import InventoryWorker
from storaged.s3.inventories import describe as describe_inventories
from storaged.s3.ops.iam.actions import perform_for_operator

SIGNER_EVERY_S = 60.0

log = structlog.get_logger("gateway")


class Gateway:
    """The planes that only a gateway has, over the planes of every node."""

    def __init__(self, node: NodePlanes) -> None:
        self._node = node
        self._config = node.config
        self._late = LateKeys()
        self._context: ssl.SSLContext | None = None
        self._belief: Belief | None = None
        self.workers: Workers | None = None
        """The further processes of this gateway; None in a further process, and where there are none."""
        self._drained = False
        self.copies: FirstCopies | None = None
        """This gateway's copies of bucket keys: in its first process, once the keyring is open."""
        self.key_ends = Ends()
        """The result of the last look at the keys of deleted buckets."""
        self._desk = CopiesDesk()
        self._reloaded = asyncio.Event()
        self._requests = RequestLog(node.metrics, node.config.log, node.audit)

    @property
    def keyring(self) -> keys.Keyring | None:
        return self._late.keyring

    @property
    def problem(self) -> str:
        """Why the keyring can't be used and needs an operator; empty otherwise."""
        return self._unlocker.problem

    @property
    def reason(self) -> str:
        """Why S3 answers 503 now; empty when it does not."""
        return self._late.reason

    async def open(self) -> None:
        """Opens the audit log and the S3 port. Raises PortInUse, and ConfigInvalid for a certificate that does not
        load.
        """
        node, config = self._node, self._config
        self._binding = binding = Binding(node.ring, node.own.cluster, node.clock, node.directory / REMEMBERED_FILE)
        node.belief.is_binding = lambda value: binding.is_authentic(value, self._late)
        self._unlocker = Unlocker(config, binding, self._late, self._make_keyring)
        plane = self._build_plane(binding)
        self._destinations = ConfiguredDestinations(config.notifications)
        self.objects = ObjectService(plane)
        self.buckets = BucketService(plane)
        self.users = UserService(plane)
        self.quotas = quotas_of(self.objects, self.buckets, self.users, node.clock)
        self.events = EventDelivery(plane, self.buckets, self._destinations, config.s3.region)
        plane.on_events = self.events.soon
        self._belief = Belief(plane, self.users)
        context = dataclasses.replace(node.maintain_context(), registers=plane.lender_registers)
        self.mover = Mover(context)
        self.discarder = Discarder(context, self.mover)
        self.partitions = PartitionDuty(node, self._late, self.buckets, plane.lender_registers)
        self.lifecycle = LifecycleDuty(self._late, plane, self.buckets, self.partitions.is_first)
        self._answers = Answers(
            node.pool,
            node.layouts,
            {
                "settle": settle_handler(plane.lender_registers),
                "move": self.mover.answer,
                "discard": self.discarder.answer,
                "divide": divide_handler(self.mover.bucket, functools.partial(divide, plane)),
                "loans": loans_handler(self.mover.bucket, functools.partial(end_old, plane)),
            },
            structlog.get_logger("maintain").error,
        )
        self._app = S3App(
            self.objects,
            AuditedBuckets(self.buckets, node.audit, node.clock),
            AuditedUsers(self.users, node.audit, node.clock),
            endpoint_of(config),
            clock=node.clock,
            entropy=system_entropy,
            on_request=self._requests,
            quotas=self.quotas,
            destinations=self._destinations,
            lock_audit=Recorder(node.audit, node.clock).audited,
        )
        self.inventories = InventoryWorker(self._app.front, plane, self.buckets, is_mine=self.partitions.is_first)
        if config.s3.tls_certificate:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            load_certificate(self._context, config)
        await self._open_port()
        self._publish_metrics(plane)

    def _build_plane(self, binding: Binding) -> ObjectPlane:
        node, config = self._node, self._config
        limits = ObjectLimits(
            small_bytes_max=config.limits.small_object_bytes_max,
            retire_delay_ms=int(config.limits.retire_delay_s * 1000),
            upload_expire_ms=int(config.limits.upload_expire_s * 1000),
            lifecycle_day_ms=int(config.limits.lifecycle_day_s * 1000),
            lifecycle_per_s=config.limits.lifecycle_per_s,
        )
        return ObjectPlane(
            registers=node.ring,
            pages=node.ring,
            scanner=node.scanner,
            fences=node.ring,
            stores=node.stores,
            liveness=node.membership,
            layouts=node.layouts,
            keys=self._late,
            clock=node.clock,
            entropy=system_entropy,
            names_authenticated=lambda: binding.authenticated,
            limits=shared_out(limits, config.s3.workers),
            on_damage=self._damaged,
            on_changed=self._changed,
            agreed_ms=agreed_time(node),
            on_degraded=node.maintain.hint,
        )

    def _publish_metrics(self, plane: ObjectPlane) -> None:
        node, app, bad_rows = self._node, self._app, plane.bad_rows
        node.metrics.gauge("storaged_system_records_damaged").set_function(lambda: len(bad_rows))
        events = node.metrics.gauge("storaged_object_events")
        for counted in dataclasses.fields(plane.counters):
            events.labels(counted.name).set_function(functools.partial(getattr, plane.counters, counted.name))
        moves = node.metrics.gauge("storaged_repair_moves")
        for counted in dataclasses.fields(MoverStatistics):
            moves.labels(counted.name).set_function(functools.partial(self._count_moves, counted.name))
        node.metrics.gauge("storaged_s3_in_flight").set_function(lambda: app.statistics().requests_in_flight)
        node.metrics.gauge("storaged_s3_connections").set_function(lambda: app.statistics().connections)
        node.metrics.gauge("storaged_s3_unauthenticated").set_function(lambda: app.statistics().unauthenticated)
        node.metrics.gauge("storaged_s3_unauthenticated_closed").set_function(lambda: app.statistics().evicted_total)
        events = node.metrics.gauge("storaged_notifications")
        for counted in dataclasses.fields(self.events.counts):
            events.labels(counted.name).set_function(functools.partial(getattr, self.events.counts, counted.name))
        lines = node.metrics.gauge("storaged_access_log_lines")
        for counted in dataclasses.fields(app.access_logs.counts):
            lines.labels(counted.name).set_function(functools.partial(getattr, app.access_logs.counts, counted.name))

    def _count_moves(self, outcome: str) -> int:
        return int(getattr(self.mover.statistics(), outcome))

    async def _open_port(self) -> None:
        node, s3, limits = self._node, self._config.s3, self.objects.plane.limits
        host, port = split_address(s3.listen)
        if node.leader is not None:
            self._app.open(self._context)
            node.leader.take_connections(self._app.adopt)
        elif s3.workers == 1:
            node.metrics.gauge("storaged_workers").set(1)
            await self._app.start(host, port, ssl=self._context)
        else:
            self._app.open(self._context)
            first = FirstProcess(self._app.adopt, node.audit, self.forget, self._desk.serve)
            self.workers = Workers(
                self._config.path,
                s3.workers,
                node.incarnation,
                node.metrics,
                first,
                remembers_s=max(limits.bucket_cache_s, limits.user_cache_s),
            )
            self.workers.listen(host, port)
            await self.workers.start()

    def work(self) -> list[Coroutine[Any, Any, None]]:
        found = [self._unlocker.run(), self._keep_keys(), self._node.maintain.run(), self._authenticate_records()]
        found.append(self.quotas.run())
        found.append(self.events.run())
        found.append(self.lifecycle.keep_notes())
        found.append(self._node.maintain.run_holds(self.objects.plane.long_reads.keys))
        if self._node.leader is None:
            found.append(housekeep(self.objects.plane, self.buckets, on_ends=self._ends_seen))
            found.append(look_at_records(self.buckets, self.users))
            found.append(self._keep_signer())
            found.append(self._answers.run())
            found += [self.partitions.run(), self.partitions.expunge(), self.lifecycle.run(), self._make_inventories()]
            found.append(self.events.run_sweep(self.partitions.is_first))
        if self.workers is not None:
            found.append(self.workers.run())
        return found

    def bad_records(self) -> list[BadRow]:
        """The unusable system records that this process found."""
        return self.objects.plane.bad_rows.listed()

    async def _make_inventories(self) -> None:
        """Runs for ever, once the keyring is open."""
        await self._late.opened.wait()
        await self.inventories.run()

    async def _keep_signer(self) -> None:
        """Runs for ever: certifies the cluster's signing key with this gateway's certificate, so that storage nodes
        believe what the key signed.
        """
        node = self._node
        await self._late.opened.wait()
        while True:
            pause_s = SIGNER_EVERY_S
            try:
                public = self._late.public_signer()
                if await publish(
                    node.paths.read, node.paths.write, NodeSigner(node.own), node.authority, node.own.cluster, public
                ):
                    log.info("the signing key of records is certified by this gateway", signer=signer_id(public).hex())
                    node.audit.note("signer.certify", target=f"signer:{signer_id(public).hex()}", outcome="done")
            except ServiceUnavailable:
                pause_s = RETRY_MAX_S
            except CertificateRefused as error:
                log.error("the signing key of records cannot be certified", reason=error.message)
            await asyncio.sleep(pause_s)

    async def _authenticate_records(self) -> None:
        """Gives authenticators to the records of earlier versions, once the keyring is open."""
        await self._late.opened.wait()
        await self._binding.finish(self._late, lambda: authenticate_all(self.objects.plane))

    def believes(self, name: RegisterName, value: Value) -> bool:
        """Whether a gateway wrote this value of the system table, as far as this process can know now."""
        return self._belief is None or (self._belief(name, value) and self.partitions.believes(name, value))

    async def usable(self, wait_s: float) -> None:
        """Waits until S3 does not answer 503 any more, ``wait_s`` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._late.opened.wait()

    async def _make_keyring(self, material: keys.KeyMaterial) -> keys.Keyring:
        """Raises as ``_open_copies``."""
        node = self._node
        registers, copies = RingRegisters(node.ring, node.scanner), await self._open_copies(material.keyring_id)
        policy, holder = self._judged_by()
        ports = keys.KeyringPorts(registers, copies, self._audit, node.clock)
        return keys.Keyring(material, ports, policy=policy, holder=holder)

    async def _open_copies(self, keyring_id: bytes) -> KeyCopies:
        """Opens this gateway's copies of bucket keys. Raises OSError, and KeyringMismatch for copies under another
        keyring.
        """
        if self._node.leader is not None:
            return LeaderCopies(self._node.leader)
        copies = CopyLog(self._node.directory, keyring_id)
        await copies.open()
        self.copies = FirstCopies(copies, self._node.clock)
        self._desk.open(self.copies)
        return self.copies

    async def _keep_keys(self) -> None:
        """Runs for ever: takes in bucket keys that an operator restored from a backup (at once after a reload), and
        drops expired keys.
        """
        await self._late.opened.wait()
        keyring = self._late.keyring
        assert keyring is not None
        while True:
            self._reloaded.clear()
            if self.copies is not None:
                await take_restored(keyring, self.copies.log)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXPIRED_EVERY_S):
                    await self._reloaded.wait()
            keyring.forget_expired()

    def _judged_by(self) -> tuple[Policy, KeyHolder]:
        revoked = self._node.peers.is_own_revoked
        return self._node.peers.policy, self._node.own.key_holder._replace(revoked=revoked)

    def judge_keys(self) -> None:
        """Asks the policy again for every key: the layout in force or this node's certificate changed."""
        if self._late.keyring is not None:
            self._late.keyring.set_policy(*self._judged_by())

    @property
    def key_refusal(self) -> str:
        """Why the policy allows no keys here now; empty when it does, and while the keyring is not open.

        A bucket's countries may still refuse the bucket's key.
        """
        refusal = self._late.keyring.refusal() if self._late.keyring is not None else None
        return "" if refusal is None else str(refusal)

    def _ends_seen(self, ends: Ends) -> None:
        self.key_ends = ends

    def key_damage(self) -> list[KeyDamage]:
        """Registers of bucket keys that were found damaged."""
        return self.copies.damaged() if self.copies is not None else []

    def offer(self, services: Services) -> None:
        """Adds what the admin API may ask of a gateway."""
        if self.workers is not None:
            services.other_samples = self.workers.gather
        services.users = self.users
        services.iam = functools.partial(perform_for_operator, self.users, self._node.clock)
        services.buckets = self.buckets
        services.every_bucket = self.buckets.every_bucket
        services.racks = lambda countries: domains_inside(self._node.layouts.current, countries)
        services.set_owner = self.buckets.set_owner
        offer_versions(services, self.objects.plane, self._node.own, allowed=self._config.s3.break_glass)
        services.usage = functools.partial(usage_after, self.objects)
        services.set_bucket_quota = functools.partial(set_bucket_quota, self.buckets)
        services.set_bucket_copies = functools.partial(set_bucket_copies, self.buckets)
        services.set_account_quota = functools.partial(set_account_quota, self.users)
        services.lifecycle = functools.partial(describe, self.objects.plane)
        services.inventories = functools.partial(describe_inventories, self.objects.plane)
        services.where = self._where
        services.key_backup = lambda passphrase: backup(self._late, self._node.directory, passphrase, self._node.clock)

    async def _audit(self, kind: str, fields: Mapping[str, str]) -> None:
        """A ``keys.ports.Audit``."""
        how, _, code = fields.get("outcome", "").partition(" ")
        if how == REFUSED:
            rest = {name: value for name, value in fields.items() if name not in ("actor", "target", "outcome")}
            actor = fields.get("actor", "") or f"node:{self._node.own.name}"
            self._node.audit.refused(kind, code, actor=actor, target=fields.get("target", ""), **rest)
            return
        try:
            await self._node.audit.append(kind, **fields)
        except AuditUnwritable:
            raise KeyringUnavailable(f"No key is released or made: {NOT_AUDITED}") from None

    async def _where(self, bucket_name: str, key: bytes) -> dict[str, Any]:
        bucket = await self.buckets.get(bucket_name)
        return where_document(bucket_name, await where(self.objects.plane, bucket, key))

    async def _changed(self, kind: str, key: str) -> None:
        """Makes every process of this gateway forget a bucket or user that changed; returns when all did."""
        if self.workers is not None:
            await self.workers.forget(kind, key)
        elif self._node.leader is not None:
            await self._node.leader.forget(kind, key)

    def bucket_fenced(self, bucket_id: bytes) -> None:
        """A replica reports that this bucket is, or was, being deleted."""
        self.buckets.fenced(bucket_id)

    def forget(self, kind: str, key: str) -> None:
        """Drops a bucket, user, account or key that another process of this gateway changed."""
        if kind == "key":
            if self._late.keyring is not None:
                self._late.keyring.forget(bytes.fromhex(key))
            return
        forget = {"bucket": self.buckets.forget, "account": self.users.accounts.forget}.get(kind, self.users.forget)
        forget(key)

    def _damaged(self, damage: Damage) -> None:
        """A read found a damaged or missing fragment; the node that looks after its register repairs it."""
        self._node.metrics.counter("storaged_fragments_damaged_total").labels(damage.disk).inc()
        log.warning(
            "a fragment is wanting",
            disk=damage.disk,
            reason=damage.reason,
            data_id=damage.fragment.data_id.hex(),
            cell=damage.cell,
        )
        self._node.maintain.hint(damage.owner, damage.fragment if damage.reason == "lied" else None)

    def reload(self, config: Config) -> None:
        """Loads a new TLS certificate and looks for a keyring again. Raises ConfigInvalid and keeps the old
        certificate.
        """
        if self._context is not None:
            load_certificate(self._context, config)
            log.info("the S3 port presents the certificate of the file", file=config.s3.tls_certificate)
        self._requests.configure(config.log)
        self._unlocker.again()
        self._reloaded.set()
        if self.workers is not None:
            self.workers.reload()

    async def drain(self) -> None:
        """Accepts no new requests and finishes those in flight."""
        if not self._drained:
            self._drained = True
            drain_s = self._config.limits.drain_s
            if self.workers is None:
                await self._app.close(drain_s)
            else:
                await asyncio.gather(self.workers.drain(drain_s), self._app.close(drain_s))

    async def close(self) -> None:
        if hasattr(self, "_app"):
            await self.drain()
        if self.workers is not None:
            await self.workers.close()
        if hasattr(self, "_app"):
            await self.lifecycle.close()
            await self.objects.close()
            await self._destinations.close()
        if self._late.keyring is not None:
            self._late.keyring.close()
        if self.copies is not None:
            self.copies.log.close()


def load_certificate(context: ssl.SSLContext, config: Config) -> None:
    """Loads the S3 certificate into ``context``. Raises ConfigInvalid, and changes nothing then: another context tries
    it first.
    """
    for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
        try:
            target.load_cert_chain(config.s3.tls_certificate, config.s3.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigInvalid(
                f"s3.tls_certificate {config.s3.tls_certificate} and its key do not load: {error}"
            ) from None
