"""What is stored about inventories: which lists of a bucket's objects are made, when, and for which bucket. Pure."""

from __future__ import annotations

from typing import Any, Final

from storaged.objects.configuration.document import Kind
from storaged.wire import Message

CSV: Final = "CSV"
PARQUET: Final = "Parquet"
DAILY: Final = "Daily"
WEEKLY: Final = "Weekly"


class InventoryEncryption(Message, frozen=True):
    """How the files of an inventory are encrypted. ``algorithm``: AES256 or aws:kms. ``key_id``: of aws:kms, as the
    client named it.
    """

    algorithm: str
    key_id: str = ""


class Inventory(Message, frozen=True):
    """One configuration. ``target``: the name of the bucket that gets the files; ``target_prefix``: of their keys;
    ``account``: of the target's owner, empty: any. ``all_versions``: also versions that are not current, and delete
    markers. ``prefix``: of the keys that are listed; None: the client named no filter. ``fields``: the optional ones,
    as the client ordered them. ``encryption``: None: as the target's configuration says.
    """

    id: str
    enabled: bool
    target: str
    format: str
    frequency: str
    all_versions: bool
    target_prefix: str | None = None
    account: str = ""
    prefix: str | None = None
    fields: tuple[str, ...] = ()
    encryption: InventoryEncryption | None = None


class Inventories(Message, frozen=True):
    """Those of a bucket, by id. Without any when all were removed: there may be rows of the table INVENTORY left."""

    reports: tuple[Inventory, ...] = ()


def _always(value: Any) -> bool:
    """Requests for objects need not look at it: a worker makes the lists."""
    return True


INVENTORY = Kind("inventory", Inventories, plain=_always)
