"""Shows this node's audit log to its witnesses: at its start, every minute, and once more when it stops.

Every other storage node of the layout is a witness. The client asks each witness once what it has of this node's log.
First it brings what the witness missed while it was away, chain by chain from the files, so that its memory has no
holes. Then the witness gets each checkpoint with the hashes of the entries since the last one that it took.

It is an alarm (``problems``) when a witness has more than the files, refuses, or saw that this chain does not follow
from the one before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import structlog

from storaged.cluster.audit.files import chain_files
from storaged.cluster.audit.format import Checkpoint
from storaged.cluster.audit.links import Link, first_line, read_links
from storaged.cluster.audit.log import AuditLog, Signer
from storaged.cluster.audit.witness import HASHES_MAX, WitnessedReply, WitnessedRequest, WitnessReply, WitnessRequest
from storaged.cluster.audit.witness_record import plain
from storaged.cluster.ports import Caller
from storaged.errors import PeerError, PeerUnreachable

EVERY_S: Final = 60.0
FIRST_S: Final = 2.0
"""After the start: by then the peers are known, and a log that was cut while the node was down is noticed early."""

CALL_TIMEOUT_S: Final = 10.0
CLOSING_TIMEOUT_S: Final = 2.0
ROUNDS_MAX: Final = 8
"""Replies in a row that ask to continue elsewhere; then the witness waits until the next minute."""

log = structlog.get_logger(__name__)


@dataclass
class _Witness:
    """One witness.

    ``sequence``: the last entry of this process's chain that it took, None until it was asked. ``past``: the problem
    with earlier chains. ``problem``: why this chain does not follow from them. ``refused``: why it takes no more of
    this one.
    """

    sequence: int | None = None
    past: str = ""
    problem: str = ""
    refused: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def alarm(self) -> str:
        return "; ".join(filter(None, (self.past, self.problem, self.refused)))


class _Refused(Exception):
    """A witness refuses for good."""


class WitnessClient:
    """Use: ``run`` as a task; ``close`` once the log is closed. ``witnesses()`` names the present witnesses."""

    def __init__(
        self,
        audit: AuditLog,
        signer: Signer,
        caller: Caller,
        witnesses: Callable[[], Sequence[str]],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self._audit = audit
        self.signer = signer
        self._caller = caller
        self._witnesses = witnesses
        self._every_s = every_s
        self._known: dict[str, _Witness] = {}

    async def run(self) -> None:
        await asyncio.sleep(min(FIRST_S, self._every_s))
        while True:
            await self.publish()
            await asyncio.sleep(self._every_s)

    async def close(self) -> None:
        """Shows the last entries, for a short time only: the witnesses may be stopping too."""
        try:
            async with asyncio.timeout(CLOSING_TIMEOUT_S):
                await self.publish()
        except TimeoutError:
            log.warning("the last entries of the audit log were not shown to all witnesses; the next start does it")

    def problems(self) -> dict[str, str]:
        """Witness -> its alarm."""
        return {name: known.alarm for name, known in sorted(self._known.items()) if known.alarm}

    def taken(self) -> dict[str, int]:
        """Witness -> the last entry of this process's chain that it took; without those that took none."""
        return {
            name: known.sequence
            for name, known in sorted(self._known.items())
            if known.sequence is not None and known.sequence >= 0
        }

    async def publish(self) -> None:
        """Shows new entries to all witnesses at once. What does not reach one is sent again the next time."""
        await asyncio.gather(*(self._publish_to(name) for name in self._witnesses()))

    async def _publish_to(self, name: str) -> None:
        known = self._known.setdefault(name, _Witness())
        if known.lock.locked():
            return  # a long catch-up is under way
        async with known.lock:
            before = known.alarm
            try:
                if known.sequence is None:
                    known.sequence = await self._catch_up(name, known)
                await self._show_current(name, known)
                known.refused = ""
            except _Refused as refused:
                known.refused, known.sequence = str(refused), None
            except PeerError as error:
                known.sequence = None  # it may have restarted, or have taken what it did not reply to
                level = log.debug if isinstance(error, PeerUnreachable) else log.warning
                level("a witness of the audit log did not take a checkpoint", witness=name, reason=error.message)
            except (OSError, ValueError) as error:
                known.sequence = None
                log.error("the audit log cannot be read again for a witness", witness=name, reason=str(error))
            if known.alarm and known.alarm != before:
                log.error("a witness does not accept this node's audit log", witness=name, reason=known.alarm)

    # Earlier chains.

    async def _catch_up(self, name: str, known: _Witness) -> int:
        """Brings a witness what it missed of earlier chains. Returns what it has of this process's chain."""
        node, current = self._audit.node, self._audit.head.chain
        answer, _ = await self._caller.call(
            name, "audit.witnessed", WitnessedRequest(node, heads=True), WitnessedReply, timeout_s=CALL_TIMEOUT_S
        )
        seen = dict(answer.heads)
        chains = await asyncio.to_thread(chain_files, self._audit.directory)
        names = [chain for chain in chains if chain != current]
        first = max((at for at, chain in enumerate(names) if chain in seen), default=0)
        for chain in names[first:] if current not in seen else ():
            try:
                await self._show_old(name, chain, chains[chain], seen.get(chain, -1))
            except _Refused as refused:
                # This process's chain is shown all the same, so that its entries are witnessed too.
                known.past = str(refused)
        have = seen.get(current, -1)
        if have > self._audit.head.sequence:
            raise _Refused(
                f"it has entry {have} of chain {current}, whose last entry here is {self._audit.head.sequence}"
            )
        return have

    async def _show_old(self, name: str, chain: str, files: Sequence[Path], have: int) -> None:
        """Shows the rest of an earlier process's chain. Raises _Refused when the witness has more of it than
        the files.
        """
        start = b""
        if have < 0:
            try:
                start = await asyncio.to_thread(first_line, files)
            except ValueError:
                # A crash tore its first entry, or its first file was removed; the witness will notice the gap.
                return
        links = read_links(chain, files)
        last = await asyncio.to_thread(_last_until, links, have)
        if last < have:
            raise _Refused(f"it has entry {have} of chain {chain}, which ends with entry {last} here")
        while piece := await asyncio.to_thread(lambda: list(islice(links, HASHES_MAX))):
            reply = await self._send(name, chain, piece, start)
            if not reply.taken:
                # It has more than it said before: an earlier call reached it late. The next minute clears this up.
                return

    # This process's chain.

    async def _show_current(self, name: str, known: _Witness) -> None:
        assert known.sequence is not None
        for _ in range(ROUNDS_MAX):
            links = await self._links_after(known.sequence)
            at, behind = 0, False
            while at < len(links) and not behind:
                piece = links[at : at + HASHES_MAX]
                reply = await self._send(name, self._audit.head.chain, piece, self._audit.start_line)
                behind = not reply.taken
                if reply.sequence < known.sequence:
                    raise _Refused(f"it had entry {known.sequence} of this chain, and has {reply.sequence} now")
                known.sequence = reply.sequence
                known.problem = plain(reply.problem) or ("" if reply.taken else known.problem)
                at += len(piece)
            if not behind:
                return
            if known.sequence > self._audit.head.sequence:
                raise _Refused(
                    f"it has entry {known.sequence} of this chain, whose last entry here is {self._audit.head.sequence}"
                )

    async def _links_after(self, sequence: int) -> Sequence[Link]:
        kept = self._audit.links.after(sequence)
        if kept is not None:
            return kept
        head = self._audit.head
        files = (await asyncio.to_thread(chain_files, self._audit.directory))[head.chain]
        return await asyncio.to_thread(lambda: list(read_links(head.chain, files, after=sequence, until=head.sequence)))

    async def _send(self, name: str, chain: str, piece: Sequence[Link], start: bytes) -> WitnessReply:
        last = piece[-1]
        after = piece[0].sequence - 1
        unsigned = Checkpoint(
            self._audit.node, chain, last.sequence, last.hash, last.link, last.time_ms, self.signer.certificate
        )
        checkpoint = unsigned.signed_with(self.signer.sign(unsigned.signed_bytes()))
        request = WitnessRequest(checkpoint, after, start if after < 0 else b"")
        body = [b"".join(link.hash for link in piece)]
        reply, _ = await self._caller.call(
            name, "audit.witness", request, WitnessReply, body=body, timeout_s=CALL_TIMEOUT_S
        )
        if reply.reason:
            raise _Refused(plain(reply.reason))
        return reply


def _last_until(links: Iterator[Link], have: int) -> int:
    """Reads up to the entry ``have``. Returns the last entry that it found."""
    last = -1
    while last < have:
        link = next(links, None)
        if link is None:
            break
        last = link.sequence
    return last
