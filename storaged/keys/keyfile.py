"""The keyring file: the keys above all bucket keys, sealed under a passphrase or a credential. FORMATS.md (Keys)
describes every field.

A file is JSON, so that an operator can see what it is: keyring id, kind of protection, the sealed body (SOV1), and the
epoch that the last backup covers. The seal binds everything but the last. A backup is the same kind of file, of version
2, under its own passphrase: a second sealed part has every bucket key that had been made (wrapped). Backups of version
1 have no such part, and are read as before.

Only ``create_keyring`` makes keys. Opening, restoring and backing up never make one, and no file is ever overwritten: a
cluster whose keyring is missing must report that, since a new keyring would lose all data sealed under the old one.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from storaged.clock import Clock, SystemClock
from storaged.durable import replace_file, sync_path
from storaged.errors import FileExists, KeyringDamaged, KeyringMismatch, OperatorError, WrongPassphrase
from storaged.ids import Entropy, system_entropy
from storaged.keys.bucketkey import KeyCopy
from storaged.keys.material import KEYRING_ID_BYTES, EpochKey, KeyMaterial, KeyringBody
from storaged.sov1 import KEY_BYTES, SALT_BYTES, SealBroken, open_message, pack_context, seal_message
from storaged.wire import decode, encode

FORMAT = "storaged keyring"
VERSION = 1
BACKUP_VERSION = 2
LABEL = "sov.keyring.v1"
BUCKETS_LABEL = "sov.keyring.buckets.v1"
CREDENTIAL_BYTES = 32
FILE_BYTES_MAX = 256 * 1024 * 1024
"""A bucket key takes some 220 bytes of a backup: this is room for a million of them."""
KDF_SALT_BYTES = 16


class Argon2Cost(NamedTuple):
    """The work of one guess at the passphrase. The default takes half a second and 256 MiB, four times RFC 9106's
    second recommendation.
    """

    memory_kib: int = 256 * 1024
    passes: int = 3
    lanes: int = 4


ARGON2_COST = Argon2Cost()
ARGON2_COST_MAX = Argon2Cost(1024 * 1024, 16, 16)
"""Upper bound of the cost in a file, four times the memory of the default: a forged file must not take all memory, nor
minutes.
"""


@dataclass(frozen=True, repr=False)
class Passphrase:
    """Protects by a text that people remember, normalised to NFC, so that it opens on every keyboard. ``cost`` counts
    when a file is made.
    """

    text: str
    cost: Argon2Cost = ARGON2_COST

    def __repr__(self) -> str:
        return "Passphrase(...)"


@dataclass(frozen=True, repr=False)
class Credential:
    """Protects by 32 random bytes that are kept elsewhere: in systemd's encrypted credentials, or in a file of mode
    0600 in a trial cluster.
    """

    secret: bytes

    def __repr__(self) -> str:
        return "Credential(...)"

    @classmethod
    def load(cls, path: Path) -> Credential:
        """Raises KeyringMismatch when the file is missing or not 32 bytes long."""
        try:
            secret = path.read_bytes()
        except OSError as error:
            raise KeyringMismatch(f"The keyring's credential {path} cannot be read: {error.strerror}.") from None
        if len(secret) != CREDENTIAL_BYTES:
            raise KeyringMismatch(
                f"The keyring's credential {path} has {len(secret)} bytes instead of {CREDENTIAL_BYTES}."
            )
        return cls(secret)

    @classmethod
    def create(cls, path: Path, entropy: Entropy = system_entropy) -> Credential:
        """A new file of mode 0600. Raises FileExists."""
        secret = entropy(CREDENTIAL_BYTES)
        _write_new(path, secret)
        return cls(secret)


Protection = Passphrase | Credential


def create_keyring(
    path: Path, protection: Protection, *, clock: Clock | None = None, entropy: Entropy = system_entropy
) -> KeyMaterial:
    """Makes new keys, epoch 1, in a new file of mode 0600: only for a new cluster. Raises FileExists."""
    now_ms = (clock or SystemClock()).wall_ms()
    body = KeyringBody((EpochKey(1, entropy(KEY_BYTES), now_ms),), entropy(KEY_BYTES), entropy(KEY_BYTES))
    keyring_id = entropy(KEYRING_ID_BYTES)
    _write_new(path, _render(keyring_id, body, protection, _Notes(0, 0), entropy))
    return KeyMaterial(path, keyring_id, body, 0)


def open_keyring(path: Path, protection: Protection, *, expected_id: bytes | None = None) -> KeyMaterial:
    """Takes half a second with a passphrase: call it in a thread.

    Raises KeyringMismatch when the file is missing or not that of ``expected_id``, WrongPassphrase (wrong credential
    too), KeyringDamaged.
    """
    return _open(path, protection, expected_id).material


class Backup(NamedTuple):
    """An opened backup. ``bucket_keys``: those that had been made; empty in a backup of version 1, for which
    ``has_bucket_keys`` is False.
    """

    material: KeyMaterial
    bucket_keys: tuple[KeyCopy, ...]
    has_bucket_keys: bool


def open_backup(path: Path, passphrase: str, *, expected_id: bytes | None = None) -> Backup:
    """As ``open_keyring``, with the bucket keys."""
    return _open(path, Passphrase(passphrase), expected_id)


def _open(path: Path, protection: Protection, expected_id: bytes | None) -> Backup:
    fields = _parse(path)
    keyring_id = _keyring_id(fields, path)
    if expected_id is not None and keyring_id != expected_id:
        raise KeyringMismatch(
            f"The keyring {path} is {keyring_id.hex()}; this cluster was created with {expected_id.hex()}."
        )
    protected = fields["protection"]
    key = _unlock(protected, protection, path)
    try:
        version = fields["version"]
        context = _context(version, keyring_id, protected)
        body = decode(open_message(key, LABEL, context, _bytes(fields["sealed"])), KeyringBody)
        bucket_keys: tuple[KeyCopy, ...] = ()
        if version == BACKUP_VERSION:
            bucket_keys = decode(_open_buckets(key, context, _bytes(fields["bucket_keys"])), tuple[KeyCopy, ...])
    except SealBroken as broken:
        if broken.index is None:
            what = "passphrase" if isinstance(protection, Passphrase) else "credential"
            raise WrongPassphrase(
                f"The {what} does not open the keyring {path} (or the file's head was altered)."
            ) from None
        raise KeyringDamaged(
            f"The keyring {path} is damaged: its keys do not open although the passphrase or credential is right."
        ) from None
    except (KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise KeyringDamaged(f"The keyring {path} is malformed: {type(error).__name__}.") from None
    material = KeyMaterial(path, keyring_id, body, _covered(fields), _number(fields, "backed_up_ms"))
    return Backup(material, bucket_keys, version == BACKUP_VERSION)


def _open_buckets(key: bytes, context: bytes, sealed: bytes) -> bytes:
    """Raises SealBroken as for damage: the passphrase was right, since the body opened."""
    try:
        return open_message(key, BUCKETS_LABEL, context, sealed)
    except SealBroken:
        raise SealBroken("the bucket keys do not open", index=0) from None


def keyring_id_of(path: Path) -> bytes:
    """The id in a keyring file's head; does not open the file. Raises KeyringMismatch, KeyringDamaged."""
    return _keyring_id(_parse(path), path)


def backup(
    material: KeyMaterial,
    path: Path,
    passphrase: str,
    bucket_keys: Sequence[KeyCopy] = (),
    *,
    now_ms: int = 0,
    cost: Argon2Cost | None = None,
    entropy: Entropy = system_entropy,
) -> None:
    """Writes a backup of mode 0600 that the passphrase opens and reads it back. Then it notes in the keyring file the
    epoch that the backup covers, and ``now_ms``: when ``bucket_keys``, all that had been made, were collected (ms since
    1970).

    Its epoch keys also open the keys of buckets created later, if the ring still has them. Raises FileExists. Takes
    about a second: call it in a thread.
    """
    protection = Passphrase(passphrase, cost or ARGON2_COST)
    notes = _Notes(material.newest.epoch, now_ms)
    _write_new(path, _render(material.keyring_id, material.body, protection, notes, entropy, tuple(bucket_keys)))
    written = open_backup(path, passphrase, expected_id=material.keyring_id)
    if written.material.body != material.body or written.bucket_keys != tuple(bucket_keys):
        raise KeyringDamaged(f"The backup {path} does not read back as it was written.")
    fields = _parse(material.path)
    fields["backed_up_epoch"] = max(_covered(fields), material.newest.epoch)
    fields["backed_up_ms"] = max(_number(fields, "backed_up_ms"), now_ms)
    try:
        replace_file(material.path, _dump(fields))
    except OSError as error:
        raise OperatorError(f"{material.path} cannot be written: {error.strerror}.") from None
    material.backed_up_epoch = max(material.backed_up_epoch, material.newest.epoch)
    material.backed_up_ms = fields["backed_up_ms"]


def restore(
    path: Path,
    passphrase: str,
    target: Path,
    *,
    protection: Protection | None = None,
    expected_id: bytes | None = None,
    entropy: Entropy = system_entropy,
) -> KeyMaterial:
    """Makes the keyring file ``target`` from the backup at ``path``, under ``protection`` (default: the backup's
    passphrase, at the backup's cost).

    Does not restore the bucket keys of the backup: see ``copies.write_restored``. ``expected_id``: the cluster's
    keyring, if known. Raises FileExists when ``target`` exists, WrongPassphrase, KeyringMismatch, KeyringDamaged.
    """
    if target.exists():
        raise FileExists(f"{target} exists already; it was left as it is.")
    saved = open_backup(path, passphrase, expected_id=expected_id).material
    if protection is None:
        protection = Passphrase(passphrase, _cost(_parse(path)["protection"], path))
    notes = _Notes(saved.newest.epoch, saved.backed_up_ms)
    _write_new(target, _render(saved.keyring_id, saved.body, protection, notes, entropy))
    return KeyMaterial(target, saved.keyring_id, saved.body, *notes)


class _Notes(NamedTuple):
    """Stored beside the seal, since it only decides whether to warn."""

    backed_up_epoch: int
    backed_up_ms: int


def _render(
    keyring_id: bytes,
    body: KeyringBody,
    protection: Protection,
    notes: _Notes,
    entropy: Entropy,
    bucket_keys: tuple[KeyCopy, ...] | None = None,
) -> bytes:
    """A keyring file; with ``bucket_keys``, even none, a backup of version 2."""
    protected: dict[str, Any] = {"kind": "credential", "salt": _text(entropy(KDF_SALT_BYTES))}
    if isinstance(protection, Passphrase):
        if not protection.text:
            raise WrongPassphrase("An empty passphrase is refused.")
        protected |= {"kind": "passphrase", "kdf": "argon2id", **protection.cost._asdict()}
    key = _unlock(protected, protection, Path("new file"))
    version = VERSION if bucket_keys is None else BACKUP_VERSION
    context = _context(version, keyring_id, protected)
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": version,
        "keyring_id": keyring_id.hex(),
        "protection": protected,
        "sealed": _text(seal_message(key, LABEL, context, encode(body), entropy(SALT_BYTES))),
    }
    if bucket_keys is not None:
        fields["bucket_keys"] = _text(
            seal_message(key, BUCKETS_LABEL, context, encode(bucket_keys), entropy(SALT_BYTES))
        )
    return _dump(fields | notes._asdict())


def _context(version: int, keyring_id: bytes, protected: Mapping[str, Any]) -> bytes:
    """What the seal binds besides the key: format version, id, and the protection's fields in the order of their names,
    ``name=value``.
    """
    named = (f"{name}={protected[name]}".encode() for name in sorted(protected))
    return pack_context(b"", [str(version).encode(), keyring_id, *named])


def _unlock(protected: Mapping[str, Any], protection: Protection, path: Path) -> bytes:
    """The key that seals the body (32 bytes)."""
    try:
        kind, salt = protected["kind"], _bytes(protected["salt"])
    except (KeyError, TypeError, ValueError) as error:
        raise KeyringDamaged(f"The keyring {path} is malformed: its protection cannot be read ({error}).") from None
    if isinstance(protection, Credential):
        if kind != "credential":
            raise WrongPassphrase(f"The keyring {path} is protected by a passphrase, not by a credential.")
        return HKDF(SHA512(), KEY_BYTES, salt, b"sov.credential.v1").derive(protection.secret)
    if kind != "passphrase":
        raise WrongPassphrase(f"The keyring {path} is protected by a credential, not by a passphrase.")
    cost = _cost(protected, path)
    text = unicodedata.normalize("NFC", protection.text).encode()
    return Argon2id(
        salt=salt, length=KEY_BYTES, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory_kib
    ).derive(text)


def _cost(protected: Mapping[str, Any], path: Path) -> Argon2Cost:
    try:
        kdf, cost = protected["kdf"], Argon2Cost(*(int(protected[name]) for name in Argon2Cost._fields))
    except (KeyError, TypeError, ValueError) as error:
        raise KeyringDamaged(f"The keyring {path} is malformed: its protection cannot be read ({error}).") from None
    bad = [
        name for name, value, limit in zip(cost._fields, cost, ARGON2_COST_MAX, strict=True) if not 1 <= value <= limit
    ]
    if kdf != "argon2id" or bad or cost.memory_kib < 8 * cost.lanes:
        raise KeyringDamaged(f"The keyring {path} asks for a derivation that is refused: {kdf}, {cost._asdict()}.")
    return cost


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise KeyringDamaged(f"{path} is too large to be a keyring.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise KeyringMismatch(f"There is no keyring at {path}.") from None
    except OSError as error:
        raise KeyringMismatch(f"The keyring {path} cannot be read: {error.strerror}.") from None
    try:
        fields = json.loads(data)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise KeyringDamaged(f"{path} is not a keyring.")
    if fields.get("version") not in (VERSION, BACKUP_VERSION):
        raise KeyringDamaged(
            f"The keyring {path} has version {fields.get('version')}; this program knows {VERSION} and"
            f" {BACKUP_VERSION}."
        )
    parts = ("sealed", "bucket_keys") if fields["version"] == BACKUP_VERSION else ("sealed",)
    if not isinstance(fields.get("protection"), dict) or not all(isinstance(fields.get(part), str) for part in parts):
        raise KeyringDamaged(f"The keyring {path} is malformed: fields are missing.")
    return fields


def _keyring_id(fields: Mapping[str, Any], path: Path) -> bytes:
    try:
        keyring_id = bytes.fromhex(fields["keyring_id"])
    except (KeyError, TypeError, ValueError):
        keyring_id = b""
    if len(keyring_id) != KEYRING_ID_BYTES:
        raise KeyringDamaged(f"The keyring {path} is malformed: it has no id.")
    return keyring_id


def _covered(fields: Mapping[str, Any]) -> int:
    """The epoch of the last backup: not sealed, since it only decides whether to warn."""
    return _number(fields, "backed_up_epoch")


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) else 0


def _dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=2).encode() + b"\n"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _write_new(path: Path, data: bytes) -> None:
    """Creates a file of mode 0600, durable when this returns. Raises FileExists, or OperatorError when it can't be
    written; then the incomplete file is removed.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise FileExists(f"{path} exists already; it was left as it is.") from None
    except OSError as error:
        raise OperatorError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OperatorError(f"{path} cannot be written: {error.strerror}.") from None
        raise
    sync_path(path.parent)
