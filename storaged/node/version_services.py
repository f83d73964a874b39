"""What the operator of a gateway may do to single versions: end their locks by signed orders (``cluster.unlock``), and
remove lost ones (``objects.write.lost``).
"""

from __future__ import annotations

from functools import partial

from storaged.admin.ports import Services
from storaged.cluster.identity import Identity
from storaged.cluster.unlock import UnlockOrder, verify_order
from storaged.errors import UnlockRefused
from storaged.objects.plane import ObjectPlane
from storaged.objects.write.locks import unlock
from storaged.objects.write.lost import forget_lost, lost_versions


def offer_versions(services: Services, plane: ObjectPlane, own: Identity, *, allowed: bool) -> None:
    """``allowed``: whether it ends locks, by its configuration."""

    def verify(document: str) -> UnlockOrder:
        if not allowed:
            raise UnlockRefused("This gateway ends no locks: its configuration has no break_glass = true in [s3].")
        return verify_order(document, own.administration, own.cluster, plane.clock.wall_ms())

    services.verify_unlock = verify
    services.unlock = partial(unlock, plane)
    services.lost_versions = partial(lost_versions, plane)
    services.forget_lost = partial(forget_lost, plane)
