"""What a node takes for a layout, a signer's statement or the record of the cluster when it settles their registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from storaged.cluster.identity import NodeSigner, authority_of
from storaged.cluster.layout import Layout
from storaged.cluster.signed_layout import sign_layout
from storaged.cluster.signers import signer_id, signer_path, state_signer
from storaged.errors import KeyringUnavailable
from storaged.meta.names import RegisterName, Value, Visibility, system_name
from storaged.node.belief import NodeBelief
from storaged.node.binding import CLUSTER, NAMES_AUTHENTICATED, Binding, ClusterRecord, _change
from storaged.wire import encode
from tests.doubles.keys import SIGNING_KEY, MemoryKeys
from tests.worlds.authority import World

PUBLIC = SIGNING_KEY.public_key().public_bytes_raw()


def value_of(body: bytes, visibility: int = Visibility.LIVE, sequence: int = 1) -> Value:
    return Value(sequence, b"o" * 16, visibility, body)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def belief_of(world: World, others: Any = lambda name, value: False) -> NodeBelief:
    own = world.node("gw", ("gateway",))
    return NodeBelief(own, authority_of(own), others)


def test_a_layout_is_one_that_the_administration_key_signed(world: World, tmp_path: Path) -> None:
    believes, name = belief_of(world), system_name("layout")
    stranger = World(tmp_path / "other").authority.administration
    mine = world.authority.administration
    assert believes(name, value_of(encode(sign_layout(Layout("c1", 1, (), (), ()), mine))))
    assert believes(name, Value(0, b"", Visibility.TOMBSTONE, b"")), "it was never written"
    for body in (
        b"",
        b"noise",
        encode(sign_layout(Layout("c1", 1, (), (), ()), stranger)),
        encode(sign_layout(Layout("c2", 1, (), (), ()), mine)),
    ):
        assert not believes(name, value_of(body))


def test_a_statement_is_a_gateways_about_the_signer_that_its_register_names(world: World) -> None:
    believes = belief_of(world)
    good = encode(state_signer(NodeSigner(world.node("gw2", ("gateway",))), "c1", PUBLIC))
    name = system_name(signer_path(signer_id(PUBLIC)))
    assert believes(name, value_of(good))
    assert not believes(system_name(signer_path(bytes(16))), value_of(good))
    assert not believes(system_name("signer/no hex"), value_of(good))
    assert not believes(name, value_of(encode(state_signer(NodeSigner(world.node("n1")), "c1", PUBLIC))))


def test_the_record_of_the_cluster_is_one_that_its_keyring_authenticated(world: World, tmp_path: Path) -> None:
    believes, keys, nothing = belief_of(world), MemoryKeys(), None
    ring: Any = nothing
    binding = Binding(ring, "c1", ring, tmp_path / "remembered")
    believes.is_binding = lambda value: binding.is_authentic(value, keys)
    record = ClusterRecord("c1", b"k" * 16, 1, NAMES_AUTHENTICATED)
    good = value_of(_change(None, record, keys).body)
    bare = value_of(encode(msgspec.structs.replace(record, authenticated=0)))
    assert believes(CLUSTER, good)
    assert believes(CLUSTER, bare), "it may be from before there were authenticators"
    binding.authenticated = True
    assert believes(CLUSTER, good)
    for forged in (bare, value_of(b"noise"), value_of(good.body, sequence=2), value_of(b"", Visibility.TOMBSTONE)):
        assert not believes(CLUSTER, forged)

    class Closed(MemoryKeys):
        def verify(self, context: Any, message: bytes, tag: bytes) -> bool:
            raise KeyringUnavailable

    assert binding.is_authentic(good, Closed()), "nothing can be judged"


def test_everything_else_is_judged_by_the_gateway(world: World) -> None:
    asked: list[RegisterName] = []

    def others(name: RegisterName, value: Value) -> bool:
        asked.append(name)
        return True

    believes = belief_of(world, others)
    assert believes(system_name("bucket/photos"), value_of(b"x"))
    assert asked == [system_name("bucket/photos")]
