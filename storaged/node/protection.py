"""What opens a gateway's keyring, by its configuration. It imports the key plane: for gateways and the command line
only.
"""

from __future__ import annotations

from pathlib import Path

from storaged import keys
from storaged.config import Config
from storaged.errors import OperatorError
from storaged.passphrase import require_long


def protection_of(config: Config, *, create: bool = False) -> keys.Protection:
    """The protection of the keyring. ``create`` makes a missing credential file, for a new or restored keyring.

    Raises KeyringMismatch for a missing credential, OperatorError for an unreadable passphrase, and with ``create``
    PassphraseTooShort.
    """
    if config.keys.credential:
        path = Path(config.keys.credential)
        if create and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return keys.Credential.create(path)
        return keys.Credential.load(path)
    text = read_passphrase(Path(config.keys.passphrase))
    if create:
        require_long(text)
    return keys.Passphrase(text)


def read_passphrase(path: Path) -> str:
    """The first line of a file. Raises OperatorError."""
    try:
        text = path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"the passphrase file {path} cannot be read: {error}") from None
    if not text:
        raise OperatorError(f"the first line of {path} is empty; it is the passphrase")
    return text
