"""What a gateway does for partitions: it moves them, signs and believes their records, and expunges deleted keys. It
decides which disks are out, and replaces those with a seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from storaged.cluster import move_settings, sparing
from storaged.cluster.layout import Layout, partition_of
from storaged.cluster.move_settings import MoveSettings
from storaged.cluster.partitions import PATH_PREFIX, PartitionRecord, PartitionState, signed_bytes
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.signers import is_signed, signer_id
from storaged.cluster.sparing import DisksOut, Vote
from storaged.cluster.votes import verify_vote
from storaged.ids import system_entropy
from storaged.maintain.expunger import Expunger, ExpungerPorts
from storaged.maintain.partition_mover import MoverPorts, PartitionMover
from storaged.maintain.spare_room import bytes_of_partition, disks_short, free_for_spares
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import Registers
from storaged.node.applying import LayoutApplication
from storaged.node.planes import NodePlanes
from storaged.node.sparing_duty import SparingDuty, SparingPorts
from storaged.node.system import write_again
from storaged.node.system_move import SystemMove
from storaged.node.system_sparing import SystemSparing, SystemSparingPorts
from storaged.node.unlock import LateKeys
from storaged.objects.system.buckets import BucketService
from storaged.wire import decode


class PartitionDuty:
    """``run`` and ``expunge`` are its tasks, in a gateway's first process. ``keys`` open when the keyring is there."""

    def __init__(self, node: NodePlanes, keys: LateKeys, buckets: BucketService, registers: Registers) -> None:
        """``registers``: also those of lenders."""
        self._keys = keys
        self._buckets = buckets
        self._cluster = node.own.cluster
        self._node = node
        self.sparing = SparingDuty(
            SparingPorts(
                layouts=node.layouts,
                caller=node.pool,
                paths=node.paths,
                clock=node.clock,
                verify=lambda signed: verify_vote(signed, node.layouts.at, node.authority, node.own.cluster),
                seen=node.sparing.times.seen,
                read=node.sparing.read,
                sign=self._sign_out,
                entropy=system_entropy,
                note=partial(_note, node),
            )
        )
        self.system_sparing = SystemSparing(
            SystemSparingPorts(
                layouts=node.layouts,
                application=LayoutApplication(node.own, node.authority, node.layouts, node.paths, node.pool),
                ask=self.sparing.ask,
                answers=node.membership.disk_readable,
                may_settle=SystemMove(node.layouts, node.own.name, node.disks.replicas, node.scanner).may_settle,
                note=partial(_note_layout, node),
            )
        )
        self.mover = PartitionMover(
            MoverPorts(
                layouts=node.layouts,
                registers=node.ring,
                scanner=node.scanner,
                pages=node.ring,
                moves=node.ring.moves,
                liveness=node.membership,
                clock=node.clock,
                sign=self._sign,
                refresh=node.follower.refresh,
                allowed=self._allowed,
                settings=lambda: node.follower.settings.current,
                gateways=self._gateways,
                room=self._room,
            )
        )
        self.expunger = Expunger(
            ExpungerPorts(
                layouts=node.layouts,
                scanner=node.scanner,
                moves=node.ring.moves,
                floors=node.ring.floors,
                liveness=node.membership,
                clock=node.clock,
                is_mine=self.is_first,
                settle=registers.settle,
            ),
            delay_s=node.config.limits.expunge_delay_s,
        )

    async def run(self) -> None:
        """Runs for ever."""
        self._node.follower.on_fallen = partial(write_again, self._node.paths)
        await self._keys.opened.wait()
        await asyncio.gather(self.mover.run(), self.sparing.run(), self.system_sparing.run())

    async def expunge(self) -> None:
        """Runs for ever."""
        await self.expunger.run()

    def is_first(self) -> bool:
        """Whether this gateway is the one that does what one of them does for the whole cluster: the first by name of
        those that are up. Two at once do no harm.
        """
        node = self._node
        entries = [entry for entry in node.layouts.current.nodes if "gateway" in entry.roles]
        up = [entry.name for entry in entries if node.membership.status(entry.name).state == "up"]
        return node.own.name == min([*up, node.own.name])

    async def _allowed(self) -> dict[int, frozenset[str]]:
        """See ``MoverPorts``."""
        found: dict[int, frozenset[str]] = {}
        for bucket in await self._buckets.every_bucket():
            if bucket.countries:
                for shard in bucket.shard_numbers:
                    partition = partition_of(bucket.id, shard)
                    found[partition] = found.get(partition, frozenset(bucket.countries)) & frozenset(bucket.countries)
        return found

    async def _room(self, layout: Layout, states: Sequence[PartitionState]) -> Mapping[str, int]:
        """See ``MoverPorts``."""
        node = self._node
        counts = await node.maintain.statuses()
        free = free_for_spares(node.membership.reports(), node.membership.disk_writable)
        return disks_short(layout, states, node.layouts.partitions.out.disks, free, bytes_of_partition(counts))

    def _gateways(self) -> int:
        """How many gateways move partitions: those that are up, and those without an address, of which this one hears
        nothing.
        """
        node = self._node
        entries = [entry for entry in node.layouts.current.nodes if "gateway" in entry.roles]
        return sum(not entry.address or node.membership.status(entry.name).state == "up" for entry in entries)

    async def set_moves(self, job: str, *, paused: bool | None, pace: int | None) -> MoveSettings:
        """Pauses or resumes a job of moves, or sets its pace, in the whole cluster. Raises InvalidArgument,
        ServiceUnavailable, and KeyringUnavailable while the keyring is not open.
        """
        node = self._node
        return await node.follower.settings.change(
            job, node.clock.wall_ms(), self._sign_settings, paused=paused, pace=pace
        )

    def _sign_settings(self, settings: MoveSettings) -> MoveSettings:
        signature = self._keys.sign_public(move_settings.signed_bytes(self._cluster, settings))
        return msgspec.structs.replace(settings, signer=signer_id(self._keys.public_signer()), signature=signature)

    def _sign(self, record: PartitionRecord) -> PartitionRecord:
        signature = self._keys.sign_public(signed_bytes(self._cluster, record))
        return msgspec.structs.replace(record, signer=signer_id(self._keys.public_signer()), signature=signature)

    def _sign_out(self, record: DisksOut) -> DisksOut:
        signature = self._keys.sign_public(sparing.signed_bytes(self._cluster, record))
        return msgspec.structs.replace(record, signer=signer_id(self._keys.public_signer()), signature=signature)

    def believes(self, name: RegisterName, value: Value) -> bool:
        """False for the record of a partition, for settings of moves, and for the record of disks that are out, if no
        gateway of this cluster signed them. True for other registers, and while the keyring is not open, since nothing
        can be verified then.
        """
        of_partition, of_disks = name.key.startswith(PATH_PREFIX.encode()), name.key == sparing.PATH.encode()
        ours = of_partition or of_disks or name.key == move_settings.PATH.encode()
        if not ours or value.sequence == 0 or self._keys.keyring is None:
            return True
        try:
            if of_partition:
                record = decode(value.body, PartitionRecord)
                signed, signature = signed_bytes(self._cluster, record), record.signature
            elif of_disks:
                out = decode(value.body, DisksOut)
                signed, signature = sparing.signed_bytes(self._cluster, out), out.signature
            else:
                settings = decode(value.body, MoveSettings)
                signed, signature = move_settings.signed_bytes(self._cluster, settings), settings.signature
        except msgspec.MsgspecError:
            return False
        key = Ed25519PublicKey.from_public_bytes(self._keys.public_signer())
        return is_signed(key, signed, signature)


def _note_layout(node: NodePlanes, signed: SignedLayout) -> None:
    """For the audit log: a layout came into force that was signed beforehand."""
    layout = decode(signed.payload, Layout)
    voters = ",".join(sorted(decode(vote.payload, Vote).node for vote in signed.votes))
    node.audit.note("layout.presigned", target=f"layout:{layout.epoch}", outcome="done", voters=voters)


def _note(node: NodePlanes, before: DisksOut, after: DisksOut) -> None:
    """For the audit log: each disk that is out now, or no more."""
    voters = ",".join(sorted({decode(signed.payload, Vote).node for signed in after.votes}))
    for disk in sorted(before.disks ^ after.disks):
        outcome = "out" if disk in after.disks else "back"
        node.audit.note("disk.out", target=f"disk:{disk}", outcome=outcome, number=after.number, voters=voters)
