"""What one process knows about where partitions are: the newest record of each, and the states that follow. Also which
disks are out, and where partitions should be while they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from storaged.cluster.layout import SYSTEM_PARTITION, Layout
from storaged.cluster.partitions import PartitionRecord, PartitionState, is_sound, state_of
from storaged.cluster.sparing import NONE_OUT, DisksOut, target
from storaged.errors import LayoutRefused, ServiceUnavailable


class PartitionMap:
    """``on_behind(node)``: a node says that it knows more steps than this map has."""

    def __init__(self) -> None:
        self.on_behind: Callable[[str], None] = lambda node: None
        self._records: dict[int, PartitionRecord] = {}
        self._states: dict[int, PartitionState] = {}
        self._layout: Layout | None = None
        """That the states are of."""
        self.complete = False
        """Whether all records were read once. Before that nothing is said of partitions that may have moved."""
        self.steps = 0
        """The sum of all steps known: the higher of two is newer in at least one partition. It only grows."""
        self.out = NONE_OUT
        """The newest record of the disks that are out."""
        self._targets: tuple[tuple[Layout, DisksOut, Layout], ...] = ()
        """(layout, disks out, target): of those in use, and of those that were prepared last."""

    def hear(self, node: str, steps: int) -> None:
        """Another node says the sum of the steps that it knows. It may lie: nothing else is concluded from it."""
        if steps > self.steps:
            self.on_behind(node)

    def of(self, number: int, current: Layout, at: Callable[[int], Layout]) -> PartitionState:
        """``at(epoch)``: an earlier layout; raises KeyError when it is not known. The same object until the layout or
        the record changes. Raises ServiceUnavailable.
        """
        if current is not self._layout:
            self._layout = current
            self._states.clear()
        state = self._states.get(number)
        if state is None:
            record = self._records.get(number)
            base = current
            if record is None and current.base and number != SYSTEM_PARTITION:
                if not self.complete:
                    raise ServiceUnavailable(
                        "This node has not read yet which partitions have moved. It reads that from the system"
                        " partition. Retry."
                    )
                try:
                    base = at(current.base)
                except KeyError:
                    raise ServiceUnavailable(
                        f"This node has not learned layout {current.base} yet, which says where the keys are. It asks"
                        " every node that it reaches. Retry."
                    ) from None
            state = self._states[number] = state_of(number, record, current, base)
        return state

    def target(self, current: Layout) -> Layout:
        """Where partitions should be: ``current`` without the disks that are out; ``current`` itself while none is."""
        for layout, out, wanted in self._targets:
            if layout is current and out is self.out:
                return wanted
        return self._note_target(current, self.out)

    def prepare(self, layout: Layout, out: DisksOut) -> None:
        """In a thread, before a layout or a record comes into use: ranks the disks for its target. The mover and
        ``status`` ask the event loop for all partitions.
        """
        layout.rank_all()
        self._note_target(layout, out).rank_all()

    def _note_target(self, layout: Layout, out: DisksOut) -> Layout:
        wanted = target(layout, out.disks)
        in_use = [known for known in self._targets if known[0] is self._layout and known[1] is self.out]
        self._targets = ((layout, out, wanted), *in_use)
        return wanted

    def note_out(self, record: DisksOut) -> bool:
        """Takes a record that was verified. Returns whether it is newer than the one known."""
        if record.number <= self.out.number:
            return False
        self.out = record
        return True

    def step_of(self, number: int, current: Layout) -> int:
        """0 for one that is not known to have moved."""
        if number == SYSTEM_PARTITION:
            return current.seeds_step
        record = self._records.get(number)
        return 0 if record is None else record.step

    @property
    def moved(self) -> int:
        """How many partitions are known to have moved."""
        return len(self._records)

    def record(self, number: int) -> PartitionRecord | None:
        return self._records.get(number)

    def fallen(self, held: Mapping[int, int]) -> list[PartitionRecord]:
        """The records that are newer than those which the system partition has. ``held``: of those, the steps."""
        return [record for number, record in self._records.items() if record.step > held.get(number, 0)]

    def learn(self, record: PartitionRecord) -> bool:
        """Takes a record that a quorum of the system partition holds. Returns whether it is newer than the one known.

        Raises LayoutRefused for a record that is none.
        """
        if not is_sound(record):
            raise LayoutRefused(f"A record of partition {record.partition}, step {record.step} is none.")
        known = self._records.get(record.partition)
        if known is not None and known.step >= record.step:
            return False
        self.steps += record.step - (known.step if known is not None else 0)
        self._records[record.partition] = record
        self._states.pop(record.partition, None)
        return True
