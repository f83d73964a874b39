"""The views of registers: made once, and again when a partition moves or the layout changes."""

from __future__ import annotations

import msgspec
import pytest

from storaged.cluster.layout import PARTITIONS
from storaged.cluster.partitions import STEP_MAX, PartitionRecord, epoch_of
from storaged.errors import LayoutRefused
from storaged.meta import views
from storaged.meta.names import RegisterName, Table, system_name
from storaged.meta.views import Views
from tests.doubles.layouts import KnownLayouts, layout_of

NAME = RegisterName(Table.OBJECT, b"b" * 16, 3, b"key")


def test_a_view_is_the_same_until_its_partition_moves() -> None:
    layouts = KnownLayouts(layout_of())
    known = Views(layouts)
    before = known.of(NAME)
    assert known.of(NAME._replace(key=b"other")) is before
    assert before.quorum.sets == (layouts.current.replicas_of(NAME.partition),)
    assert before.epoch == 1
    a, b, c = before.quorum.disks
    new = next(disk.id for disk in layouts.current.disks if disk.id not in (a, b, c))
    layouts.partitions.learn(PartitionRecord(NAME.partition, 1, (a, b, c), (a, new, c), 1))
    joint = known.of(NAME)
    assert joint.quorum.sets == ((a, b, c), (a, new, c))
    assert joint.epoch == epoch_of(1, 1)
    assert joint.positions[joint.quorum.disks.index(new)] == 1
    layouts.partitions.learn(PartitionRecord(NAME.partition, 2, (a, new, c), (), 1))
    assert known.of(NAME).quorum.sets == ((a, new, c),)
    assert known.of(NAME).epoch == epoch_of(2, 1)


def test_another_layout_makes_other_views() -> None:
    layouts = KnownLayouts(layout_of())
    known = Views(layouts)
    assert known.of(system_name("user/x")).epoch == 1
    layouts.partitions.complete = True
    layouts.learn(msgspec.structs.replace(layout_of(epoch=2), seeds=("a1", "b0", "c0"), base=1))
    assert known.of(system_name("user/x")).quorum.disks == ("a1", "b0", "c0")
    assert known.of(NAME).epoch == 2


@pytest.mark.parametrize(
    "record",
    [
        PartitionRecord(NAME.partition, 2, ("a0", "a0", "b0"), (), 1),
        PartitionRecord(NAME.partition, 1, ("a0", "b0", "c0"), ("a0", "b0", "a0"), 1),
        PartitionRecord(NAME.partition, 2, (), (), 1),
        PartitionRecord(NAME.partition, 2, ("a0",), (), 1, lost=("a0",)),
        PartitionRecord(NAME.partition, 0, ("a0", "b0", "c0"), (), 1),
        PartitionRecord(NAME.partition, STEP_MAX + 1, ("a0", "b0", "c0"), (), 1),
        PartitionRecord(PARTITIONS, 2, ("a0", "b0", "c0"), (), 1),
    ],
)
def test_a_record_of_which_no_state_can_be_made_changes_no_view(record: PartitionRecord) -> None:
    """A gateway may lie: all nodes would fail at each request of the partition, and after each restart."""
    layouts = KnownLayouts(layout_of())
    known = Views(layouts)
    before = known.of(NAME)
    with pytest.raises(LayoutRefused):
        layouts.partitions.learn(record)
    assert known.of(NAME) is before


def test_views_of_few_places_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "VIEWS_MAX", 2)
    known = Views(KnownLayouts(layout_of()))
    for shard in range(8):
        assert known.of(NAME._replace(shard=shard)).epoch == 1
        assert len(known._views) <= 2
