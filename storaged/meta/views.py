"""Where the replicas of registers are now: their ``View``, remembered until a partition moves or the layout changes."""

from __future__ import annotations

from storaged.cluster.layout import Layout
from storaged.cluster.ports import Layouts
from storaged.meta.consensus.quorums import View
from storaged.meta.names import RegisterName

VIEWS_MAX = 16_384
"""Table, scope and shard whose replicas are remembered: a thousand buckets'."""


class Views:
    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts
        self._partitions = layouts.partitions
        self._layout: Layout | None = None
        self._steps = -1
        self._views: dict[tuple[int, bytes, int], View] = {}
        """Of the layout and the steps of partitions above, by table, scope and shard."""

    def of(self, name: RegisterName) -> View:
        """Raises ServiceUnavailable while this node lacks the layout that placed the partition."""
        layout = self._layouts.current
        if layout is not self._layout or self._partitions.steps != self._steps or len(self._views) >= VIEWS_MAX:
            self._layout, self._steps, self._views = layout, self._partitions.steps, {}
        where = name[:3]
        view = self._views.get(where)
        if view is None:
            state = self._layouts.partition(name.partition)
            view = self._views[where] = View.of(state.epoch, *state.sets, lost=state.lost)
        return view
