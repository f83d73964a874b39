"""The ring in one dict passes the suite of the ring."""

from __future__ import annotations

import pytest

from tests.doubles.disks import Disks
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.doubles.ring import MemoryRing
from tests.suites.ring import RingPorts, RingSuite


class TestMemoryRing(RingSuite):
    @pytest.fixture
    def ring(self) -> RingPorts:
        layouts = KnownLayouts(layout_of())
        ring = MemoryRing(layouts, Disks(layouts.current))
        return RingPorts(ring, ring, ring, ring, ring)
