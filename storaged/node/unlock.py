"""Opens a gateway's keyring, and backs it up.

A keyring is used only when the register ``cluster`` names it. Keys are never made here: a missing or different keyring
is KEYRING_MISMATCH until an operator restores it, and a reload looks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog

from storaged import keys
from storaged.clock import Clock
from storaged.config import Config
from storaged.errors import KeyringUnavailable, OperatorError, ServiceUnavailable, StoragedError
from storaged.ids import system_entropy
from storaged.node.binding import Binding
from storaged.node.protection import protection_of
from storaged.objects.ports import BucketKey, EndedKey, KeyService

RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0

log = structlog.get_logger("gateway")


class LateKeys:
    """A ``KeyService`` over the keyring once it is open and is the cluster's own. Raises KeyringUnavailable before."""

    def __init__(self) -> None:
        self.keyring: keys.Keyring | None = None
        self.reason = "the keyring is not open yet"
        self.opened = asyncio.Event()

    def _open(self) -> KeyService:
        if self.keyring is None:
            raise KeyringUnavailable(f"Nothing can be sealed or opened: {self.reason.rstrip('.')}.")
        return self.keyring

    async def create_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...]) -> None:
        await self._open().create_bucket_key(bucket_id, countries)

    async def end_bucket_key(self, bucket_id: bytes, name: str, nonce: bytes, shards: Sequence[int]) -> None:
        await self._open().end_bucket_key(bucket_id, name, nonce, shards)

    async def ended_bucket_keys(self) -> Sequence[EndedKey]:
        return await self._open().ended_bucket_keys()

    async def destroy_bucket_key(self, bucket_id: bytes, nonce: bytes) -> bool:
        return await self._open().destroy_bucket_key(bucket_id, nonce)

    async def reconcile_copies(self, buckets: Mapping[bytes, tuple[str, ...]]) -> None:
        await self._open().reconcile_copies(buckets)

    async def bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> BucketKey:
        return await self._open().bucket_key(bucket_id, countries, version)

    def try_bucket_key(self, bucket_id: bytes, countries: tuple[str, ...], version: int = 0) -> BucketKey | None:
        return self._open().try_bucket_key(bucket_id, countries, version)

    def authenticate(self, context: Sequence[bytes], message: bytes) -> bytes:
        return self._open().authenticate(context, message)

    def verify(self, context: Sequence[bytes], message: bytes, tag: bytes) -> bool:
        return self._open().verify(context, message, tag)

    def keyring_id(self) -> bytes:
        return self._open().keyring_id()

    def sign_public(self, message: bytes) -> bytes:
        return self._open().sign_public(message)

    def public_signer(self) -> bytes:
        return self._open().public_signer()

    def seal_secret(self, plaintext: bytes, context: Sequence[bytes]) -> bytes:
        return self._open().seal_secret(plaintext, context)

    def open_secret(self, sealed: bytes, context: Sequence[bytes]) -> bytes:
        return self._open().open_secret(sealed, context)


class Unlocker:
    """Opens the keyring and publishes it to ``LateKeys`` when the register ``cluster`` names it."""

    def __init__(
        self,
        config: Config,
        binding: Binding,
        late: LateKeys,
        make_keyring: Callable[[keys.KeyMaterial], Awaitable[keys.Keyring]],
    ) -> None:
        """``make_keyring`` makes the key service of an opened keyring file."""
        self._config = config
        self._binding = binding
        self._late = late
        self._make_keyring = make_keyring
        self.problem = ""
        """Why the keyring can't be used and needs an operator; empty otherwise."""
        self._again = asyncio.Event()

    def again(self) -> None:
        """Looks for a keyring again, if none is open."""
        self._again.set()

    async def run(self) -> None:
        """Runs until the keyring is open. It retries while a majority is missing; for a keyring that does not fit it
        waits for ``again``.
        """
        pause_s = RETRY_FIRST_S
        while self._late.keyring is None:
            self._again.clear()
            try:
                await self._unlock()
            except ServiceUnavailable as error:
                self._late.reason = f"the ring does not answer ({error.message})"
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            except (OperatorError, OSError) as error:
                self.problem = error.message if isinstance(error, StoragedError) else str(error)
                self._late.reason = self.problem
                code = error.code if isinstance(error, StoragedError) else "KEYRING_MISMATCH"
                log.error(
                    "the keyring cannot be used; S3 answers 503 until it is restored and the gateway reloaded",
                    code=code,
                    reason=self.problem,
                )
                await self._again.wait()

    async def _unlock(self) -> None:
        path = Path(self._config.keys.keyring)
        material = await asyncio.to_thread(lambda: keys.open_keyring(path, protection_of(self._config)))
        record = await self._binding.check(material.keyring_id)
        keyring = await self._make_keyring(material)
        await self._binding.confirm(record, material.keyring_id, keyring)
        self._late.keyring = keyring
        self.problem = self._late.reason = ""
        self._late.opened.set()
        log.info("the keyring is open", keyring=material.keyring_id.hex())


async def backup(late: LateKeys, directory: Path, passphrase: str, clock: Clock) -> tuple[str, bytes]:
    """Returns the keyring's id and its backup under ``passphrase``, with every bucket key made so far.

    The keyring file remembers the backup's epoch and time. Raises ServiceUnavailable when the ring can't be listed, as
    a backup must be whole.
    """
    if late.keyring is None:
        raise KeyringUnavailable(f"There is no keyring to back up: {late.reason.rstrip('.')}.")
    material = late.keyring.material
    now_ms = clock.wall_ms()
    found = await late.keyring.homes.inventory()
    if found.lost:
        log.error(
            "a backup of the keyring lacks keys that open nowhere",
            buckets=",".join(lost.hex() for lost in found.lost[:10]),
        )
    # a name of its own, as two backups at once have two passphrases
    path = directory / f"backup-{system_entropy(8).hex()}.new"
    try:
        await asyncio.to_thread(keys.backup, material, path, passphrase, found.copies, now_ms=now_ms)
        return material.keyring_id.hex(), path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
