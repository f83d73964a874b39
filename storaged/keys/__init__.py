"""Keys: created, held and used by gateways only. No storage role imports this package.

``material`` is an opened keyring, ``keyfile`` reads and writes keyring files and backups, ``keyring`` serves keys from
one. ``bucketkey`` has the records and the cryptography of bucket keys, which have two homes: the ring, and ``copies``
in the gateway. ``homes`` compares the two (pure), ``upkeep`` keeps them alike. ``ports`` names what the package needs
from others.
"""

from __future__ import annotations

from storaged.keys.bucketkey import KeyCopy
from storaged.keys.copies import CopyLog, write_restored
from storaged.keys.keyfile import (
    Argon2Cost,
    Backup,
    Credential,
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
from storaged.keys.material import KeyMaterial
from storaged.keys.ports import Audit, KeyChange, KeyCopies, KeyringPorts, StoredRegister, SystemRegisters

__all__ = [
    "Argon2Cost",
    "Audit",
    "Backup",
    "CopyLog",
    "Credential",
    "KeyChange",
    "KeyCopies",
    "KeyCopy",
    "KeyMaterial",
    "Keyring",
    "KeyringPorts",
    "KeyringStatistics",
    "Passphrase",
    "Protection",
    "StoredRegister",
    "SystemRegisters",
    "backup",
    "create_keyring",
    "keyring_id_of",
    "open_backup",
    "open_keyring",
    "restore",
    "write_restored",
]
