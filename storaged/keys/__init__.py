"""Keys: made, held and used by gateways only. No storage role imports this package.

``keyfile`` reads and writes keyring files, ``keyring`` serves keys from one, ``ports`` names what it needs.
"""

from __future__ import annotations

from storaged.keys.keyfile import (
    Argon2Cost,
    Credential,
    KeyMaterial,
    Passphrase,
    Protection,
    backup,
    create_keyring,
    keyring_id_of,
    open_keyring,
    restore,
)
from storaged.keys.keyring import Keyring, KeyringStatistics
from storaged.keys.ports import AlreadyThere, Audit, SystemRegisters

__all__ = [
    "AlreadyThere",
    "Argon2Cost",
    "Audit",
    "Credential",
    "KeyMaterial",
    "Keyring",
    "KeyringStatistics",
    "Passphrase",
    "Protection",
    "SystemRegisters",
    "backup",
    "create_keyring",
    "keyring_id_of",
    "open_keyring",
    "restore",
]
