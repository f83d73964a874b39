"""Keys: made, held and used by gateways only. No storage role imports this package.

``keyfile`` reads and writes keyring files and backups, ``keyring`` serves keys from one, ``bucketkey`` has the records
and the cryptography of bucket keys,
``homes`` compares the two places where they are kept (pure), ``upkeep`` keeps those alike, ``copies`` is the second
place; ``ports`` names what is needed.
"""

from __future__ import annotations

from storaged.keys.bucketkey import KeyCopy
from storaged.keys.copies import CopyLog, lay_restored
from storaged.keys.keyfile import (
    Argon2Cost,
    Backup,
    Credential,
    KeyMaterial,
    Passphrase,
    Protection,
    backup,
    create_keyring,
    keyring_id_of,
    open_backup,
    open_keyring,
    restore,
)
from storaged.keys.keyring import Keyring, KeyringStatistics
from storaged.keys.ports import Audit, Kept, KeyChange, KeyCopies, SystemRegisters

__all__ = [
    "Argon2Cost",
    "Audit",
    "Backup",
    "CopyLog",
    "Credential",
    "Kept",
    "KeyChange",
    "KeyCopies",
    "KeyCopy",
    "KeyMaterial",
    "Keyring",
    "KeyringStatistics",
    "Passphrase",
    "Protection",
    "SystemRegisters",
    "backup",
    "create_keyring",
    "keyring_id_of",
    "lay_restored",
    "open_backup",
    "open_keyring",
    "restore",
]
