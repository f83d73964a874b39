"""Keeps the layouts that this node knows: the one in force, and the earlier ones that records still name.

A layout is believed because of its signature, from any sender. Epochs only grow: a layout that is older than the one in
force joins the history and changes nothing, and a second one under an epoch already known is refused, since one of the
two was not meant to exist.

A newer layout that moves a replica or a disk (``cluster.moves``) needs more than its signature: it follows a known
layout by the rules of ``cluster.succession``, and has that layout's certificate (``cluster.certificates``). Otherwise
the node continues with its present layout. The first layout of a node must be one that no other layout had to place
(``Layout.base`` is 0): from there the node follows the history, and verifies each step.

A node keeps the layouts that it used in its directory, with their certificates, so that it knows the present one at its
next start; then it verifies them again. It keeps what it refused, and who offered it, for ``status``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import MsgspecError
from msgspec.structs import replace

from storaged.clock import Clock, SystemClock
from storaged.cluster.certificates import ACCEPTANCE_BYTES_MAX, ACCEPTANCES_MAX, verify_certificate
from storaged.cluster.layout import Layout, NodeEntry
from storaged.cluster.moves import RefusedLayout, moves_between
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionState
from storaged.cluster.presigned import FOLLOWING_BYTES_MAX, genuine
from storaged.cluster.signed_layout import LAYOUT_BYTES_MAX, SignedLayout, verify_layout
from storaged.cluster.succession import check_profile, check_successor, follows_instead, is_numbered_as_moving
from storaged.durable import replace_file
from storaged.errors import LayoutRefused
from storaged.wire import decode, encode

log = structlog.get_logger(__name__)

HISTORY_MAX = 4096
"""Layouts kept in memory: one change a day for eleven years."""

REFUSALS_MAX = 16
"""Sources whose refused layouts are kept for ``status``."""

REASON_CHARS_MAX = 500
PEER = "node "
"""The prefix of a source's name when the source is a peer."""

OFFER_LASTS_S = 60.0
"""A peer that uses another layout offers it at every ping. When it has made no offer for this time it has stopped."""

DIGEST_BYTES = 16

Persist = Callable[[int, SignedLayout], Awaitable[None]]
"""``await persist(epoch, signed)`` returns when the layout is durable."""


class LayoutBook:
    """Implements ``Layouts``. ``known`` are the layouts that this node has used (see :class:`LayoutFiles`); each is
    verified again.

    ``authority`` verifies certificates of layouts; without it no layout that moves data is believed.

    ``on_refusal(refused)`` is called once for each layout that is refused, and again when the reason changes.
    """

    def __init__(
        self,
        administration: Ed25519PublicKey,
        cluster: str,
        *,
        known: Iterable[SignedLayout] = (),
        persist: Persist | None = None,
        clock: Clock | None = None,
        authority: x509.Certificate | None = None,
    ) -> None:
        self.proposed: Layout | None = None
        """A signed layout that is not decided yet. Only its addresses are used, so that a new node finds the others."""
        self.on_refusal: Callable[[RefusedLayout], None] = lambda _refused: None
        self.partitions = PartitionMap()
        self._administration = administration
        self._cluster = cluster
        self._authority = authority
        self._persist = persist
        self._clock = clock or SystemClock()
        self._refused: dict[str, tuple[float, bytes, RefusedLayout]] = {}
        """Source -> when it last offered (monotonic seconds), the digest of the offer, and why it is refused."""
        self._signed: dict[int, SignedLayout] = {}
        self._layouts: dict[int, Layout] = {}
        self._by_hash: dict[bytes, int] = {}
        self._current: Layout | None = None
        self._revoked: set[bytes] = set()
        self._learning = asyncio.Lock()
        self._watchers: list[Callable[[Layout], None]] = []
        self._revocation_watchers: list[Callable[[], None]] = []
        kept = list(known)
        for signed in kept:
            layout = verify_layout(signed, administration, cluster)
            if signed is kept[-1] and layout.seeds_next and layout.base and not signed.certificate and self._current:
                # Version 0.1.0 takes a joint layout for one that moves nothing, and keeps no certificate of it. This
                # node goes on with the layout before, and learns that one again from others.
                log.warning("a layout is kept here without its certificate", epoch=layout.epoch)
                continue
            if layout.base:  # those that were used before layouts could move data are believed as they were then
                self._check(layout, signed)
            self._adopt(layout, signed)

    @property
    def current(self) -> Layout:
        """Raises LayoutRefused while this node has no layout."""
        if self._current is None:
            raise LayoutRefused("This node knows no layout yet; it learns one from the first peer that it reaches.")
        return self._current

    @property
    def epoch(self) -> int:
        """The epoch of the layout in force; 0 when there is none."""
        return self._current.epoch if self._current is not None else 0

    @property
    def digest(self) -> bytes:
        """The digest of the layout in force, so that two nodes notice when they use different ones of one epoch. Empty
        without a layout.
        """
        return _digest_of(self._signed[self._current.epoch]) if self._current is not None else b""

    def refusals(self) -> tuple[RefusedLayout, ...]:
        """The refused layouts that are still being offered, as far as this node knows."""
        now = self._clock.monotonic()
        return tuple(
            refused
            for offered, _, refused in self._refused.values()
            if not refused.source.startswith(PEER) or now - offered < OFFER_LASTS_S
        )

    def at(self, epoch: int) -> Layout:
        return self._layouts[epoch]

    def partition(self, number: int) -> PartitionState:
        return self.partitions.of(number, self.current, self.at)

    def knows(self, epoch: int) -> bool:
        return epoch in self._layouts

    def signed(self, epoch: int) -> SignedLayout:
        """Raises KeyError when this node does not know that epoch."""
        return self._signed[epoch]

    def has(self, signed: SignedLayout) -> bool:
        """Whether this node has used exactly this layout, or keeps it in its history."""
        return self._by_hash.get(signed.hash) is not None

    def earlier(self) -> list[Layout]:
        """The layouts that this node knows but the one in force, newest first."""
        return [self._layouts[epoch] for epoch in sorted(self._layouts, reverse=True) if epoch != self.epoch]

    def by_hash(self, hash_: bytes) -> Layout | None:
        """The layout with this ``SignedLayout.hash``; None when this node does not know it."""
        epoch = self._by_hash.get(hash_)
        return self._layouts[epoch] if epoch is not None else None

    @property
    def generation(self) -> int:
        """The epoch of the newest layout in force that moved data; 0 when none ever did."""
        return max((epoch for epoch, known in self._layouts.items() if is_numbered_as_moving(known)), default=0)

    def contact(self, node: str) -> NodeEntry | None:
        """Where to call a node: by a newer layout that is proposed, else by the one in force."""
        if self.proposed is not None and self.proposed.epoch > self.epoch:
            entry = self.proposed.node_by_name.get(node)
            if entry is not None:
                return entry
        return self.current.node_by_name.get(node)

    async def propose(self, signed: SignedLayout) -> None:
        """Notes a signed layout that may come into force. Raises LayoutRefused for one that is not this cluster's."""
        layout = verify_layout(signed, self._administration, self._cluster)
        if layout.epoch > max(self.epoch, self.proposed.epoch if self.proposed is not None else 0):
            self.proposed = layout

    def lacking(self, after: int) -> int | None:
        """The lowest epoch after ``after`` and before the one in force whose layout this node lacks; None if there is
        none.

        It may be an epoch under which no layout was ever signed, or used.
        """
        if len(self._layouts) >= HISTORY_MAX:
            return None
        return next((epoch for epoch in range(max(after, 0) + 1, self.epoch) if epoch not in self._layouts), None)

    def signed_after(self, epoch: int) -> SignedLayout | None:
        """The next layout after ``epoch``, to pass on; None when there is none."""
        following = [known for known in self._signed if known > epoch]
        return self._signed[min(following)] if following else None

    def watch(self, watcher: Callable[[Layout], None]) -> None:
        """``watcher(layout)`` is called for each layout that comes into force."""
        self._watchers.append(watcher)

    def is_revoked(self, fingerprint: bytes) -> bool:
        """Whether any layout that this node knows revokes the certificate, be it in force or not.

        So a revocation can't be undone by a later layout that does not name it. It may go when the certificate has
        expired, which ends it anyway. Of two layouts with one epoch a node takes the first, with its revocations, and
        ``refusals`` names the other: then the administrator who revoked signs again.
        """
        return fingerprint in self._revoked

    def watch_revocations(self, watcher: Callable[[], None]) -> None:
        """``watcher()`` is called when further certificates are revoked."""
        self._revocation_watchers.append(watcher)

    async def learn(self, signed: SignedLayout, source: str) -> bool:
        """Verifies a layout, persists it, then uses it. Returns whether it is new to this node.

        ``source`` names who offers it, for the operator.

        Raises LayoutRefused when the layout is not signed by this cluster, is another one of a known epoch, or moves a
        replica or a disk and lacks a certificate. Then the node keeps its layout, and ``refusals`` names the refused
        one.
        """
        digest = _offered(signed)
        if (known := self._refused.get(source)) is not None and known[1] == digest and known[2].epoch > self.epoch:
            self._refused[source] = (self._clock.monotonic(), digest, known[2])
            raise LayoutRefused(known[2].reason)
        epoch = 0
        try:
            layout = verify_layout(signed, self._administration, self._cluster)
            epoch = layout.epoch
            new = await self._learn(layout, signed)
        except LayoutRefused as error:
            self.refuse(epoch, source, error.message, digest)
            raise
        self._refused.pop(source, None)
        return new

    def prepare(self, layout: Layout) -> None:
        """In a thread, before a layout is used: computes what the event loop would have to compute of all partitions at
        once (``PartitionMap.prepare``).
        """
        self.partitions.prepare(layout, self.partitions.out)
        if (base := self._layouts.get(layout.base)) is not None:
            base.rank_all()

    def refuse(self, epoch: int, source: str, reason: str, digest: bytes = b"") -> None:
        """Notes, logs and reports a refused layout; a repetition only renews the note."""
        refused = RefusedLayout(epoch, source, reason[:REASON_CHARS_MAX])
        known = self._refused.get(source)
        if known is None and len(self._refused) >= REFUSALS_MAX:
            del self._refused[min(self._refused, key=lambda name: self._refused[name][0])]
        self._refused[source] = (self._clock.monotonic(), digest, refused)
        if known is None or known[2] != refused:
            log.error("a layout is refused", epoch=epoch, source=source, reason=refused.reason, in_force=self.epoch)
            self.on_refusal(refused)

    def agrees(self, source: str) -> None:
        """The peer ``source`` uses the layout in force, or an older one: this drops its earlier offer."""
        self._refused.pop(source, None)

    async def _learn(self, layout: Layout, signed: SignedLayout) -> bool:
        if layout.epoch < 1:
            raise LayoutRefused("Epochs are numbered from 1.")
        async with self._learning:
            known = self._signed.get(layout.epoch)
            if known is not None:
                if known.payload != signed.payload:
                    raise LayoutRefused(f"Another layout is known under epoch {layout.epoch}; this one is refused.")
                await self._learn_following(layout.epoch, known, signed)
                return False
            signed = await asyncio.to_thread(self._kept_of, signed)
            in_force = layout.epoch > self.epoch
            await asyncio.to_thread(self._check, layout, signed)
            if in_force:
                await asyncio.to_thread(self.prepare, layout)
            if self._persist is not None:
                await self._persist(layout.epoch, signed)
            revoked = len(self._revoked)
            self._adopt(layout, signed)
        if len(self._revoked) > revoked:
            for watch_revoked in self._revocation_watchers:
                watch_revoked()
        if in_force:
            log.info("layout in force", epoch=layout.epoch, nodes=len(layout.nodes), disks=len(layout.disks))
            for watcher in self._watchers:
                watcher(layout)
        return True

    def _kept_of(self, signed: SignedLayout) -> SignedLayout:
        """What a node keeps of a layout: of those that were signed beforehand to follow it, the genuine ones."""
        return replace(signed, following=genuine(signed, self._administration), votes=())

    async def _learn_following(self, epoch: int, known: SignedLayout, signed: SignedLayout) -> None:
        """A process of an earlier version, or one that lies, may have passed a layout on without what follows it."""
        if known.following or not signed.following or epoch != self.epoch:
            return
        found = await asyncio.to_thread(self._kept_of, replace(signed, certificate=known.certificate))
        if found.following:
            if self._persist is not None:
                await self._persist(epoch, found)
            self._signed[epoch] = found

    def _check(self, layout: Layout, signed: SignedLayout) -> None:
        """Raises LayoutRefused for a layout that this node must not use, or keep in its history."""
        newer = self._current is not None and layout.epoch > self.epoch
        moves = moves_between(self.current, layout) if newer else None
        if not moves and not layout.base:
            if newer:
                check_profile(self.current, layout)
            return
        if newer:
            try:
                before = self.judge(layout)
            except LayoutRefused as error:
                raise LayoutRefused(f"{error.message} It would move data: {moves}.") if moves else error from None
        elif (known := self.by_hash(layout.predecessor)) is not None:
            before = known
        else:
            raise LayoutRefused(
                f"Layout {layout.epoch} follows layouts that this node does not know. It asks every node for them."
            )
        if check_successor(before, layout.predecessor, layout):
            if self._authority is None:
                raise LayoutRefused(f"Layout {layout.epoch} moves data, and nothing here verifies its certificate.")
            verify_certificate(signed, layout, before, self._authority)

    def is_overtaken(self, layout: Layout) -> bool:
        """Whether a layout that follows an earlier one can't come into force any more: another one came first. One that
        was decided is overtaken by a recovery of the system partition alone.
        """
        before = self.by_hash(layout.predecessor)
        if before is None or before is self._current or follows_instead(self.current, layout):
            return False
        return bool(moves_between(before, self.current))

    def judge(self, layout: Layout) -> Layout:
        """Returns the predecessor of a layout that may come into force. Raises LayoutRefused, with the reason, for one
        that may not. It does not look at certificates.
        """
        before = self.by_hash(layout.predecessor)
        if before is None:
            raise LayoutRefused(
                f"Layout {layout.epoch} follows a layout that this node does not know, or none. This node is at layout"
                f" {self.epoch}."
            )
        between = moves_between(before, self.current) if before is not self._current else None
        if between and not follows_instead(self.current, layout):
            raise LayoutRefused(
                f"Layout {layout.epoch} follows layout {before.epoch}. Layout {self.epoch} came first, and moved data:"
                f" {between}."
            )
        if layout.epoch <= self.epoch:
            raise LayoutRefused(f"Layout {layout.epoch} is older than layout {self.epoch}, which is in force.")
        check_successor(before, layout.predecessor, layout)
        return before

    def _adopt(self, layout: Layout, signed: SignedLayout) -> None:
        self._signed[layout.epoch] = signed
        self._layouts[layout.epoch] = layout
        self._by_hash[signed.hash] = layout.epoch
        self._revoked.update(revoked.fingerprint for revoked in layout.revoked)
        if layout.epoch > self.epoch:
            self._current = layout
        self._judge_again(signed)
        if len(self._signed) > HISTORY_MAX:
            oldest = min(epoch for epoch in self._signed if epoch != self.current.base)
            del self._by_hash[self._signed[oldest].hash], self._signed[oldest], self._layouts[oldest]

    def _judge_again(self, signed: SignedLayout) -> None:
        """What was refused may follow the layout that is known now. This very layout is refused no more."""
        digest = _digest_of(signed)
        for source, (offered, known, refused) in list(self._refused.items()):
            if known[:DIGEST_BYTES] == digest:
                del self._refused[source]
            else:
                self._refused[source] = (offered, b"", refused)


def _offered(signed: SignedLayout) -> bytes:
    """The digest of a layout and of its certificate: with another certificate it is judged again."""
    return _digest_of(signed) + hashlib.sha256(encode(signed.certificate)).digest()[:DIGEST_BYTES]


def _digest_of(signed: SignedLayout) -> bytes:
    return signed.hash[:DIGEST_BYTES]


class LayoutFiles:
    """Layouts as files of a directory: ``layout-EPOCH.signed``, an encoded :class:`SignedLayout`, synced before its
    use.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self) -> list[SignedLayout]:
        """The newest ``HISTORY_MAX`` layouts, oldest first, and the one that placed what never moved. Raises
        LayoutRefused for a file that does not decode. The book verifies signatures and certificates.
        """
        paths = sorted(self.directory.glob("layout-*.signed"))
        found = [self._read(path) for path in paths[-HISTORY_MAX:]]
        if len(paths) > HISTORY_MAX and (base := decode(found[-1].payload, Layout).base):
            path = self._path(base)
            if path in paths[:-HISTORY_MAX]:
                found.insert(0, self._read(path))
        return found

    def _read(self, path: Path) -> SignedLayout:
        try:
            return decode(path.read_bytes(), SignedLayout)
        except MsgspecError as error:
            raise LayoutRefused(
                f"{path} does not decode: {error}. Replace it by the file of this name that another node has in its"
                " directory `layouts`: it is as good."
            ) from error

    def _path(self, epoch: int) -> Path:
        return self.directory / f"layout-{epoch:012d}.signed"

    async def save(self, epoch: int, signed: SignedLayout) -> None:
        """A ``Persist``."""
        await asyncio.to_thread(self._write, epoch, encode(signed))

    def _write(self, epoch: int, content: bytes) -> None:
        most = LAYOUT_BYTES_MAX + ACCEPTANCES_MAX * (ACCEPTANCE_BYTES_MAX + 16) + FOLLOWING_BYTES_MAX
        assert len(content) <= most + 1024
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(epoch), content, 0o666)
