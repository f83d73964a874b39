"""Checks new passphrases that protect keys. Old files open with the passphrase that they were made with."""

from __future__ import annotations

import unicodedata
from typing import Final

from storaged.errors import PassphraseTooShort

CHARS_MIN: Final = 12
"""NIST SP 800-63B-4 requires 15 characters where the passphrase is the only factor, and 8 otherwise. Here an attacker
needs the file too, and pays Argon2id for every guess."""


def require_long(text: str) -> None:
    """Raises PassphraseTooShort for one under CHARS_MIN characters (of its NFC form, which is what is hashed)."""
    count = len(unicodedata.normalize("NFC", text))
    if count < CHARS_MIN:
        raise PassphraseTooShort(f"a passphrase has at least {CHARS_MIN} characters; this one has {count}")
