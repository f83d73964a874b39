"""The epochs of one acceptor on disk: below them it refuses requests (``consensus.acceptor``).

``epoch`` is the disk's own, a lower bound for all partitions. ``epoch NNNN`` is that of a partition that has moved.
Both are 8 bytes, big-endian.

An epoch is in force from the moment that it was asked for. What follows from it is answered when it is on disk: then it
holds after a restart too, when promises are forgotten and the floors of the later step say nothing about earlier ones.
"""

from __future__ import annotations

from storaged.cluster.partitions import STEP_SHIFT, step_of
from storaged.meta.acceptor.disk_writes import DiskWrites
from storaged.meta.consensus.acceptor import FIRST_STEP, AcceptorState
from storaged.meta.consensus.register import Rules
from storaged.meta.messages import WHOLE_DISK, EpochFence
from storaged.meta.names import RegisterName
from storaged.meta.store_ports import MetaStore, StoreBatch

META_EPOCH = "epoch"
_OF_PARTITION = META_EPOCH + " "
_PARTITIONS_MAX = 2_000
"""Above ``layout.PARTITIONS``."""


def stored_epochs(store: MetaStore) -> dict[int, int]:
    """By partition, of those that have moved. Raises RowDamaged."""
    return {
        int(name.removeprefix(_OF_PARTITION)): int.from_bytes(store.get_meta(name) or b"", "big")
        for name in store.meta_names(_OF_PARTITION, after="", limit=_PARTITIONS_MAX)
    }


class Epochs:
    """``durable``: by partition, as they are on disk."""

    def __init__(self, state: AcceptorState, writes: DiskWrites, rules: Rules, of_disk: int) -> None:
        """``of_disk``: the disk's own epoch, as it is on disk."""
        self.durable = dict(state.epochs)
        self._of_disk = of_disk
        self._state = state
        self._writes = writes
        self._rules = rules

    def behind(self, name: RegisterName, epoch: int) -> bool:
        """Whether the step of this epoch is higher than what the disk has for the register's partition."""
        durable = self.durable.get(self._state.partition_of(name), 0)
        return step_of(epoch) > step_of(durable) and self._rules.steps_durable

    async def raise_at(self, partition: int, epoch: int) -> None:
        """Returns when it is on disk. Raises what the store raises."""
        if epoch < FIRST_STEP:
            return
        state, durable = self._state, self.durable
        state.raise_epoch_at(partition, epoch)
        fence = step_of(epoch) << STEP_SHIFT
        if durable.get(partition, 0) >= fence:
            return
        written = state.epochs[partition]  # never lower than one that is already on its way
        await self._writes.durably(
            StoreBatch(meta={f"{_OF_PARTITION}{partition:04d}": written.to_bytes(8, "big")}),
            lambda: durable.update({partition: max(durable.get(partition, 0), written)}),
        )

    async def fence(self, request: EpochFence) -> int:
        """Returns the epoch that is on disk then: at least that of the request."""
        partition, epoch = request.partition, request.epoch
        if partition == WHOLE_DISK:
            return await self._raise_disk(epoch)
        await self.raise_at(partition, epoch)
        return max(epoch, self.durable.get(partition, 0))

    async def _raise_disk(self, epoch: int) -> int:
        state = self._state
        state.raise_epoch(epoch)
        raised = state.epoch
        if raised > self._of_disk:
            await self._writes.durably(StoreBatch(meta={META_EPOCH: raised.to_bytes(8, "big")}))
            self._of_disk = max(self._of_disk, raised)
        return self._of_disk
