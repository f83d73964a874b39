"""Whatever writes registers without keys, in whatever order with what gateways do: no wrong key is ever released, none
is lost
while a gateway has a copy, and none comes back once it is destroyed."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import KeyringUnavailable
from storaged.ids import system_entropy
from storaged.keys import create_keyring
from storaged.keys.bucketkey import DESTROYED, BucketKeyRecord, KeyCopy, Vault
from storaged.objects.ports import pack_context
from storaged.wire import decode, encode
from tests.examples import examples
from tests.unit.test_keyring import CREDENTIAL, Copies, Rig

BUCKETS = [bytes([number]) * 16 for number in range(2)]
CONTEXT = pack_context(b"", [b"any"])
NONCE = b"n" * 16
MATERIAL = create_keyring(Path(tempfile.mkdtemp()) / "keyring", CREDENTIAL)

JUNK = [
    b"",
    b"\xc1",
    b"\x00",
    encode(BucketKeyRecord(BUCKETS[0], ())),
    encode(BucketKeyRecord(BUCKETS[0], (), DESTROYED)),
]

forgeries = st.one_of(
    st.sampled_from(JUNK).map(lambda body: ("junk", body)),
    st.integers(0, 30).map(lambda number: ("replay", number)),
    st.sampled_from(["strip", "destroy", "flip", "swap", "state"]).map(lambda how: (how, None)),
)
steps = st.one_of(
    st.tuples(st.just("use"), st.integers(0, 1), st.integers(0, 1)),
    st.tuples(st.just("lose copies"), st.integers(0, 1)),
    st.tuples(st.just("look"), st.integers(0, 1)),
    st.tuples(st.just("forge"), st.integers(0, 1), forgeries),
    st.tuples(st.just("end"), st.integers(0, 1), st.integers(0, 1)),
    st.tuples(st.just("destroy"), st.integers(0, 1), st.integers(0, 1)),
)


class Model:
    """Two gateways over one ring. ``gone``: buckets whose key was destroyed by a gateway that was allowed to."""

    def __init__(self) -> None:
        self.copies = [Copies(), Copies()]
        first = Rig(MATERIAL, copies=self.copies[0], cache_ttl_s=0.0)  # every use is a release
        self.rigs = [first, Rig(MATERIAL, registers=first.registers, copies=self.copies[1], cache_ttl_s=0.0)]
        self.ring = first.registers
        self.wrapped: dict[bytes, bytes] = {}
        self.gone: set[bytes] = set()
        self.seen: list[bytes] = []

    async def begin(self) -> None:
        for bucket in BUCKETS:
            await self.rigs[0].keyring.create_bucket_key(bucket, ())
            self.wrapped[bucket] = (await self.rigs[0].keyring.bucket_key(bucket, ())).wrap(b"d" * 32, CONTEXT)

    async def take(self, step: tuple[Any, ...]) -> None:
        what, which = step[0], step[1]
        if what == "use":
            await self.use(which, BUCKETS[step[2]])
        elif what == "lose copies":
            self.copies[which].held.clear()
        elif what == "look":
            living = {bucket: () for bucket in BUCKETS if bucket not in self.gone}
            await self.rigs[which].keyring.reconcile_copies(living)
        elif what == "forge":
            self.forge(BUCKETS[which], *step[2])
        elif what == "end":
            await self.rigs[which].keyring.end_bucket_key(BUCKETS[step[2]], "name", NONCE, range(16))
        elif await self.rigs[which].keyring.destroy_bucket_key(BUCKETS[step[2]], NONCE):
            self.gone.add(BUCKETS[step[2]])

    async def use(self, gateway: int, bucket: bytes) -> None:
        rig = self.rigs[gateway]
        had = bucket in rig.copies.held
        try:
            key = await rig.keyring.bucket_key(bucket, ())
        except KeyringUnavailable:
            assert bucket in self.gone or not had, "a gateway that has a copy refuses"
        else:
            assert key.unwrap(self.wrapped[bucket], CONTEXT) == b"d" * 32

    def forge(self, bucket: bytes, how: str, what: Any) -> None:
        """As who has no key: what was seen, altered or put elsewhere. A destroyed key's place is left alone: who kept
        its wrapped key
        could put that back, and has it anyway."""
        path = "key/" + bucket.hex()
        body = self.ring.values[path]
        self.seen.append(body)
        if bucket in self.gone:
            return
        try:
            record = decode(body, BucketKeyRecord)
        except msgspec.MsgspecError:
            record = BucketKeyRecord(bucket, ())
        forged = {
            "junk": lambda: what,
            "replay": lambda: self.seen[what % len(self.seen)],
            "strip": lambda: encode(msgspec.structs.replace(record, authenticator=b"")),
            "destroy": lambda: encode(msgspec.structs.replace(record, versions=(), state=DESTROYED)),
            "flip": lambda: bytes([*body[:-1], body[-1] ^ 1]) if body else b"",
            "swap": lambda: self.ring.values["key/" + BUCKETS[bucket == BUCKETS[0]].hex()],
            "state": lambda: encode(msgspec.structs.replace(record, state="other")),
        }[how]()
        self.ring.forge(path, forged)

    def check(self) -> None:
        vault = Vault(MATERIAL, system_entropy)
        for rig in self.rigs:
            for bucket, copy in rig.copies.held.items():
                for entry in decode(copy, KeyCopy).versions:
                    vault.open(bucket, entry)
        for bucket in self.gone:
            assert decode(self.ring.values["key/" + bucket.hex()], BucketKeyRecord).state == DESTROYED


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(steps, max_size=25))
def test_no_order_of_forgeries_and_uses_loses_a_key_that_a_gateway_has_or_brings_one_back(
    order: list[tuple[Any, ...]],
) -> None:
    async def run() -> None:
        model = Model()
        await model.begin()
        for step in order:
            await model.take(step)
            model.check()

    asyncio.run(run())
