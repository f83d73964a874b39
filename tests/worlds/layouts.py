"""Layouts that move data, their signatures and certificates, for a small cluster of one authority."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from msgspec.structs import replace

from storaged.cluster.certificates import accept
from storaged.cluster.identity import Identity, NodeSigner
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.signed_layout import SignedLayout, sign_layout
from storaged.cluster.succession import base_after, exchanged_seeds, next_epoch
from tests.worlds.authority import World

NODES = ("n1", "n2", "n3")


def place_of(name: str) -> str:
    return f"FR/par1/{name}"


def first(names: Sequence[str] = NODES, epoch: int = 1, **facts: Any) -> Layout:
    """A node in each rack with two disks: ``d1a`` and ``d1b`` of ``n1``."""
    nodes = tuple(NodeEntry(name, place_of(name), f"{name}:1", ("storage",)) for name in names)
    nodes += (NodeEntry("gw", place_of("n1"), "", ("gateway",)),)
    disks = tuple(DiskEntry(f"d{name[1:]}{letter}", name, 1000) for name in names for letter in "ab")
    seeds = tuple(f"d{name[1:]}a" for name in names[:3])
    return Layout("c1", epoch, nodes, disks, seeds, "2+1", **facts)


def with_nodes(before: Layout, *names: str, **facts: Any) -> Layout:
    """``before`` with further storage nodes, unnumbered and without a predecessor."""
    more = first(names)
    return replace(
        before, nodes=before.nodes + more.nodes[:-1], disks=before.disks + more.disks, predecessor=b"", **facts
    )


class History:
    """Signs layouts, each after the one before, with the nodes' acceptances."""

    def __init__(self, world: World, layout: Layout | None = None) -> None:
        self.world = world
        self.own: dict[str, Identity] = {}
        self.layouts = [layout or first()]
        self.signed = [self.sign(self.layouts[0])]

    def sign(self, layout: Layout) -> SignedLayout:
        return sign_layout(layout, self.world.authority.administration)

    def identity(self, name: str) -> Identity:
        if name not in self.own:
            roles = ("gateway",) if name == "gw" else ("storage",)
            self.own[name] = self.world.node(name, roles, place_of("n1" if name == "gw" else name))
        return self.own[name]

    def after(self, wanted: Layout, *, moving: bool = True, **facts: Any) -> Layout:
        """``wanted``, numbered and named as the successor of the last layout."""
        before, signed = self.layouts[-1], self.signed[-1]
        usual: dict[str, Any] = {
            "epoch": next_epoch(before.epoch, moving=moving),
            "predecessor": signed.hash,
            "base": base_after(before) if moving else before.base,
        }
        return replace(wanted, **(usual | facts))

    def accepted(
        self, layout: Layout, names: Collection[str] = ("n1", "n2"), signed: SignedLayout | None = None
    ) -> SignedLayout:
        """Signed and with the acceptances of ``names``, of ``signed`` where it is given."""
        bare = self.sign(layout)
        certificate = tuple(accept(NodeSigner(self.identity(name)), signed or bare, layout) for name in names)
        return replace(bare, certificate=certificate)

    def add(self, layout: Layout, signed: SignedLayout) -> SignedLayout:
        self.layouts.append(layout)
        self.signed.append(signed)
        return signed

    def move(self, wanted: Layout, names: Collection[str] = ("n1", "n2"), **facts: Any) -> SignedLayout:
        """Adds a layout that moves data, with its certificate."""
        layout = self.after(wanted, **facts)
        return self.add(layout, self.accepted(layout, names))

    def exchange(self, old: str, wanted: Layout) -> tuple[Layout, Layout]:
        """The joint layout without seed ``old``, and the settled one after it. ``wanted``: without ``old``."""
        before = self.layouts[-1]
        seeds = exchanged_seeds(before, old, wanted)
        joint = replace(before, seeds_next=seeds, seeds_step=before.seeds_step + 1)
        settled = replace(wanted, seeds=seeds, seeds_next=(), seeds_step=before.seeds_step + 2)
        return joint, settled

    def book(self, *known: SignedLayout, **facts: Any) -> LayoutBook:
        authority = self.world.authority
        return LayoutBook(
            authority.administration.public_key(),
            "c1",
            known=known or self.signed[:1],
            authority=authority.certificate,
            **facts,
        )
