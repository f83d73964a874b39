"""An opened keyring: the keys above all bucket keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from storaged.wire import Message

KEYRING_ID_BYTES = 16


class EpochKey(Message, frozen=True):
    """Bucket keys are wrapped under the newest epoch key. Older ones stay until no bucket key needs them; destroying
    one shreds what it wrapped.
    """

    epoch: int
    key: bytes
    created_ms: int

    def __repr__(self) -> str:
        return f"EpochKey(epoch={self.epoch})"


class KeyringBody(Message, frozen=True):
    """The sealed body: epoch keys in ascending order, the key that authenticates records, the key that seals S3
    secrets.
    """

    epochs: tuple[EpochKey, ...]
    record_key: bytes
    secret_key: bytes

    def __repr__(self) -> str:
        return "KeyringBody(...)"


class KeyMaterial:
    """An opened keyring file. Holds secrets: never logged, and its repr shows only the id."""

    def __init__(
        self, path: Path, keyring_id: bytes, body: KeyringBody, backed_up_epoch: int, backed_up_ms: int = 0
    ) -> None:
        self.path = path
        self.keyring_id = keyring_id
        self.epochs: Mapping[int, EpochKey] = {entry.epoch: entry for entry in body.epochs}
        self.newest = body.epochs[-1]
        self.record_key = body.record_key
        self.secret_key = body.secret_key
        self.backed_up_epoch = backed_up_epoch
        """The newest epoch that a backup covers; 0: there is no backup."""
        self.backed_up_ms = backed_up_ms
        """When the last backup was made (ms since 1970); 0: there is none, or a version made it that did not note the
        time. Bucket keys made later are in no backup.
        """
        self.body = body

    def __repr__(self) -> str:
        return f"KeyMaterial(keyring_id={self.keyring_id.hex()}, newest epoch={self.newest.epoch})"
