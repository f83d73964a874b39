"""What opens a gateway's keyring, by its configuration. It imports the key plane: for gateways and the command line
only.
"""

from __future__ import annotations

import os
from pathlib import Path

from storaged import keys
from storaged.config import NO_CREDENTIALS, Config
from storaged.errors import OperatorError
from storaged.passphrase import require_long


def protection_of(config: Config, *, create: bool = False) -> keys.Protection:
    """The protection of the keyring. ``create`` makes a missing credential file, for a new or restored keyring.

    Raises KeyringMismatch for a missing credential, OperatorError for an unreadable passphrase, and with ``create``
    PassphraseTooShort, and OperatorError where systemd gives the credential and this process has none: a keyring under
    a new one could not be opened by the gateway.
    """
    if config.keys.credential:
        path = Path(config.keys.credential)
        if create:
            _require_given(path)
        if create and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return keys.Credential.create(path)
        return keys.Credential.load(path)
    text = read_passphrase(Path(config.keys.passphrase))
    if create:
        require_long(text)
    return keys.Passphrase(text)


def _require_given(path: Path) -> None:
    """Raises OperatorError for a credential that systemd gives to the gateway, where this command does not have it."""
    place = os.environ.get("CREDENTIALS_DIRECTORY")
    if path.is_relative_to(place or NO_CREDENTIALS) and not (place and path.exists()):
        raise OperatorError(
            f"systemd gives the credential {path.name!r} to the gateway, and this command does not have it: put it,"
            " decrypted, into a directory, and name that in CREDENTIALS_DIRECTORY (deploy/README.md, «Keys and their"
            " backup»). Nothing was changed."
        )


def read_passphrase(path: Path) -> str:
    """The first line of a file. Raises OperatorError."""
    try:
        text = path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"the passphrase file {path} cannot be read: {error}") from None
    if not text:
        raise OperatorError(f"the first line of {path} is empty; it is the passphrase")
    return text
