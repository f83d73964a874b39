"""Brings a signed layout into force: ``storaged cluster apply``, on a gateway.

Theory of operation. A layout that moves nothing is learnt, and spreads. One that moves data takes these steps, each of
which may be repeated on any gateway:

1. The register ``layout`` must hold the predecessor, usable itself. A compare-and-set puts the layout in its place. Of
   two administrators one succeeds; the other gets LAYOUT_OVERTAKEN, with what was decided.
2. The nodes with seed disks of the predecessor are asked for acceptances, until a majority has given one
   (LAYOUT_NOT_ACCEPTED names those that are missing).
3. The acceptances, as the layout's certificate, go into the register with it.
4. This gateway uses the layout, and passes it on with its certificate.

After step 1 the layout is decided: it can't be withdrawn. What it moves can be moved back by the next layout.

A layout that recovers the system partition takes the steps 2 and 4 alone: the register can't be changed then. It is
refused while the register can be read. All nodes with a seed disk that is left are asked, one after the other in the
order of their names, so that of two administrators one gets all acceptances.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog
from cryptography import x509
from msgspec import MsgspecError
from msgspec.structs import replace

from storaged.cluster.certificates import accepted_by, is_enough, seed_nodes
from storaged.cluster.identity import Identity
from storaged.cluster.layout import Layout
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.messages import AcceptAnswer
from storaged.cluster.moves import changes_between, moves_between
from storaged.cluster.ports import Caller
from storaged.cluster.signed_layout import Acceptance, SignedLayout, verify_layout
from storaged.cluster.succession import recovers
from storaged.cluster.votes import check_said_out
from storaged.errors import (
    LayoutNotAccepted,
    LayoutOvertaken,
    LayoutRefused,
    NoQuorum,
    PeerError,
    RecoverRefused,
    S3Error,
    VoteRefused,
)
from storaged.node.recovering import READ_S
from storaged.node.system import SystemPaths, exchange_layout, is_pending
from storaged.wire import decode, encode

SOURCE = "storaged cluster apply"
CALL_S = 5.0
AGAIN_S = 0.5
COLLECT_S = 20.0
"""How long a node that is up but does not know the predecessor yet has to learn it."""

log = structlog.get_logger("node")


class LayoutApplication:
    """Of one gateway. ``collect_s``: how long acceptances are collected. ``answers(disk)``: whether a disk can be read
    now.
    """

    def __init__(
        self,
        own: Identity,
        authority: x509.Certificate,
        layouts: LayoutBook,
        paths: SystemPaths,
        caller: Caller,
        *,
        collect_s: float = COLLECT_S,
        answers: Callable[[str], bool] = lambda _disk: False,
    ) -> None:
        self._own = own
        self._authority = authority
        self._layouts = layouts
        self._paths = paths
        self._caller = caller
        self._collect_s = collect_s
        self._answers = answers

    async def newest(self) -> tuple[SignedLayout, bool]:
        """The layout that was decided last, and whether it is in force. Without a majority of the system partition, or
        where the register has no layout: the one in force here.
        """
        with contextlib.suppress(S3Error, LayoutRefused, MsgspecError):
            decided = await self._decided()
            known = decided is None or self._layouts.has(decided)
            if not known and decided is not None and not self._layouts.is_overtaken(decode(decided.payload, Layout)):
                return decided, False
        return self._layouts.signed(self._layouts.epoch), True

    async def apply(self, signed: SignedLayout) -> dict[str, Any]:
        """Returns the document of ``storaged cluster apply``: ``epoch``, ``moves`` (texts), ``accepted`` (the nodes
        that accepted it now).

        Raises LayoutRefused, LayoutOvertaken, LayoutNotAccepted, NoQuorum.
        """
        layout = await asyncio.to_thread(verify_layout, signed, self._own.administration, self._own.cluster)
        if self._layouts.has(signed):
            if layout.epoch < self._layouts.epoch:
                raise LayoutOvertaken(f"Layout {layout.epoch} was in force. Layout {self._layouts.epoch} followed it.")
            return self._document(layout, (), ())
        self._check_lost(layout)
        moves = await asyncio.to_thread(moves_between, self._layouts.current, layout)
        if not moves or signed.certificate:
            if not signed.certificate:
                self._check_first(layout)
            await self._take(signed)
            return self._document(layout, moves.disks, ())
        if recovers(layout):
            return await self._recover(signed, layout, moves.disks)
        try:
            await exchange_layout(self._paths, self._layouts)
            before = await self._decide(signed, layout)
            accepted = await self._collect(signed, layout, before)
            certified = replace(signed, certificate=tuple(accepted[name] for name in sorted(accepted)), votes=())
            await self._paths.replace("layout", lambda body: _with_certificate(body, certified))
        except S3Error as error:
            # No majority, or one too slow. A change of unknown outcome is found when the command is repeated.
            raise NoQuorum(f"The system partition does not answer: {error.message}") from None
        except LayoutRefused:
            if self._layouts.epoch != layout.epoch or not self._layouts.has(signed):
                raise
            # Another gateway brought it into force, and this node has learnt it meanwhile.
            return self._document(layout, moves.disks, ())
        await self._layouts.learn(certified, SOURCE)
        return self._document(layout, moves.disks, tuple(sorted(accepted)))

    async def _recover(self, signed: SignedLayout, layout: Layout, moves: tuple[str, ...]) -> dict[str, Any]:
        """Brings a layout into force by which the system partition goes on without a quorum. Raises RecoverRefused,
        LayoutRefused, LayoutOvertaken, LayoutNotAccepted.
        """
        before = await asyncio.to_thread(self._layouts.judge, layout)
        with contextlib.suppress(S3Error, TimeoutError, LayoutRefused):
            async with asyncio.timeout(READ_S):
                await self._decided()
            raise RecoverRefused(
                f"Layout {layout.epoch} goes on without a quorum of the seed disks, and the system partition has one."
            )
        accepted = {node: await self._accepted(node, signed, before) for node in sorted(seed_nodes(before, layout))}
        await self._take(replace(signed, certificate=tuple(accepted.values())))
        log.warning("the system partition goes on without its majority", epoch=layout.epoch, accepted=list(accepted))
        return self._document(layout, moves, tuple(accepted))

    async def _accepted(self, node: str, signed: SignedLayout, before: Layout) -> Acceptance:
        """The acceptance of one node, which is asked until it gives one. Raises LayoutNotAccepted."""
        layout, ends = decode(signed.payload, Layout), asyncio.get_running_loop().time() + self._collect_s
        while True:
            try:
                answer, _ = await self._caller.call(node, "cluster.accept", signed, AcceptAnswer, timeout_s=CALL_S)
                if accepted_by(answer.acceptance, signed, layout, before, self._authority) == node:
                    return answer.acceptance
                reason = "it sent another node's acceptance"
            except (PeerError, LayoutRefused) as error:
                reason = error.message
            if asyncio.get_running_loop().time() >= ends:
                raise LayoutNotAccepted(
                    f"Layout {layout.epoch} goes on without a quorum of the seed disks. All nodes with a seed disk that"
                    f" is left have to accept it, and {node} does not ({reason})."
                )
            await asyncio.sleep(AGAIN_S)

    def _check_lost(self, layout: Layout) -> None:
        """Raises RecoverRefused for a layout that calls a disk lost which answers: it could still be of a quorum that
        the others do not know.
        """
        new = set(layout.lost) - set(self._layouts.current.lost)
        if answering := sorted(disk for disk in new if self._answers(disk)):
            raise RecoverRefused(
                f"Layout {layout.epoch} calls disk {', '.join(answering)} lost for good, and it answers. Power its node"
                " off for ever, or take the disk out of it."
            )

    def _document(self, layout: Layout, moves: tuple[str, ...], accepted: tuple[str, ...]) -> dict[str, Any]:
        return {"epoch": layout.epoch, "moves": list(moves), "accepted": list(accepted)}

    async def _take(self, signed: SignedLayout) -> None:
        """Uses a layout that needs no acceptances any more."""
        await self._layouts.learn(signed, SOURCE)
        with contextlib.suppress(S3Error):  # it spreads by pings, too, and goes into the register later
            await exchange_layout(self._paths, self._layouts)

    def _check_first(self, layout: Layout) -> None:
        """Raises LayoutOvertaken for a layout that does not follow the one in force, LayoutRefused when that can't be
        known.
        """
        current = self._layouts.current
        if not layout.predecessor or layout.predecessor == self._layouts.signed(current.epoch).hash:
            return
        before = self._layouts.by_hash(layout.predecessor)
        if before is None:
            raise LayoutRefused(
                f"Layout {layout.epoch} follows a layout that was never in force here. In force is layout"
                f" {current.epoch}. If other layouts were signed between them, apply those first, in their order."
            )
        raise LayoutOvertaken(
            f"Layout {layout.epoch} follows layout {before.epoch}. Layout {current.epoch} came first."
            f" {_changed(before, current)}"
        )

    # --- the register

    async def _decided(self) -> SignedLayout | None:
        """The layout in the register. Raises ServiceUnavailable, and LayoutRefused for a value that is no layout."""
        body = await self._paths.read("layout")
        try:
            return decode(body, SignedLayout) if body is not None else None
        except MsgspecError as error:
            raise LayoutRefused(f"The register of the layout does not decode: {error}") from None

    async def _decide(self, signed: SignedLayout, layout: Layout) -> Layout:
        """Returns the predecessor, once the register holds this layout."""
        decided = await self._decided()
        if decided is None or decided.payload != signed.payload:
            self._check_first(layout)
            await asyncio.to_thread(self._check_out, layout, signed)
        before = await asyncio.to_thread(self._layouts.judge, layout)

        def choose(body: bytes | None) -> bytes | None:
            held = decode(body, SignedLayout) if body is not None else None
            if held is None or held.hash != layout.predecessor or is_pending(held, self._layouts):
                return None
            return encode(replace(signed, certificate=()))

        body = await self._paths.replace("layout", choose)
        held = decode(body, SignedLayout) if body is not None else None
        if held is None:
            raise LayoutRefused("The register of the layout has no value.")
        if held.payload != signed.payload:
            raise self._overtaken(signed, layout, before, held)
        return before

    def _overtaken(self, signed: SignedLayout, layout: Layout, before: Layout, held: SignedLayout) -> LayoutOvertaken:
        """The error for a layout that the register does not hold. When another process decided a layout meanwhile, this
        one may have been in force and been succeeded since. It is certainly not used only if it has the same
        predecessor as the decided one.
        """
        winner = decode(held.payload, Layout)
        if winner.predecessor == signed.hash:
            return LayoutOvertaken(
                f"Layout {layout.epoch} was in force. Layout {winner.epoch} followed it. {_changed(layout, winner)}"
            )
        now = "decided, and not in force yet: apply it first" if is_pending(held, self._layouts) else "decided"
        if winner.predecessor != layout.predecessor:
            return LayoutOvertaken(
                f"Layout {layout.epoch} is not decided now, and may have been before: layout {winner.epoch} is {now}."
            )
        return LayoutOvertaken(
            f"Layout {layout.epoch} is not used: another layout {winner.epoch} is {now}. {_changed(before, winner)}"
        )

    def _check_out(self, layout: Layout, signed: SignedLayout) -> None:
        """Raises LayoutRefused for a layout that was signed beforehand, without votes that its case is there: no node
        would accept it, and once decided it would stand in the way of all others.
        """
        if not layout.if_out:
            return
        layouts, own = self._layouts, self._own
        try:
            check_said_out(layout.if_out, signed.votes, layouts.generation, layouts.at, self._authority, own.cluster)
        except VoteRefused as error:
            raise LayoutRefused(f"Layout {layout.epoch} is for the loss of {layout.if_out}. {error.message}") from None

    # --- acceptances

    async def _collect(self, signed: SignedLayout, layout: Layout, before: Layout) -> dict[str, Acceptance]:
        """The acceptances of nodes that are enough. Raises LayoutNotAccepted."""
        found: dict[str, Acceptance] = {}
        reasons: dict[str, str] = {}
        wanted = sorted(seed_nodes(before, layout))
        enough, once = asyncio.Event(), {node: asyncio.Event() for node in wanted}

        async def ask(node: str) -> None:
            while True:
                try:
                    answer, _ = await self._caller.call(node, "cluster.accept", signed, AcceptAnswer, timeout_s=CALL_S)
                    if accepted_by(answer.acceptance, signed, layout, before, self._authority) == node:
                        found[node] = answer.acceptance
                        if is_enough(before, layout, found):
                            enough.set()
                        once[node].set()
                        return
                    reasons[node] = "it sent another node's acceptance"
                except (PeerError, LayoutRefused) as error:
                    reasons[node] = error.message
                once[node].set()
                await asyncio.sleep(AGAIN_S)

        asking = [asyncio.create_task(ask(node)) for node in wanted]
        try:
            async with asyncio.timeout(self._collect_s):
                await enough.wait()
        except TimeoutError:
            for event in once.values():  # each call has its own limit
                await event.wait()
            if enough.is_set():
                return found
            missing = [f"{node} ({reasons.get(node, 'no answer yet')})" for node in wanted if node not in found]
            raise LayoutNotAccepted(
                f"Layout {layout.epoch} is decided, and not in force yet: too few nodes have accepted it. Missing:"
                f" {'; '.join(missing)}. Accepted: {', '.join(sorted(found)) or 'none'}."
            ) from None
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        log.info("a layout has its certificate", epoch=layout.epoch, accepted=sorted(found))
        return found


def _with_certificate(body: bytes | None, certified: SignedLayout) -> bytes | None:
    held = decode(body, SignedLayout) if body is not None else None
    if held is None or held.payload != certified.payload or held.certificate:
        return None
    return encode(certified)


def _changed(before: Layout, after: Layout) -> str:
    return f"It changed: {'; '.join(changes_between(before, after)) or 'nothing'}."
