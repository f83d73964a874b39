"""Makes a storage node a witness of the other nodes' audit logs: two RPC methods over one file per node,
``witness/NODE.jsonl`` in its own directory.

``audit.witness`` takes a checkpoint of a node's log from that node only; ``witness_record`` judges it. An accepted
checkpoint is synced before the reply, and nothing ever removes it. A file that has grown is rewritten with each chain's
last checkpoint and some marks before it. ``audit.witnessed`` gives what the witness remembers to any node of the
cluster: hashes and signatures, and the ``start`` entries of chains.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509

from storaged.clock import Clock, SystemClock
from storaged.cluster.audit.format import HASH_BYTES, Checkpoint
from storaged.cluster.audit.trail import Trail
from storaged.cluster.audit.witness_record import (
    LINE_BYTES_MAX,
    Accepted,
    Behind,
    Refused,
    SeenNode,
    adopt,
    judge,
    read,
    render,
    render_whole,
)
from storaged.cluster.identity import signed_by_node
from storaged.cluster.ports import Call, Method, Methods, Reply
from storaged.cluster.rpc.authority import grant
from storaged.durable import append_durably, replace_file, sync_path
from storaged.errors import CertificateRefused, ServiceUnavailable, StoragedError
from storaged.wire import Message

HASHES_MAX: Final = 4096
"""Hashes in one call: 128 KiB, a few milliseconds of hashing."""

NODES_MAX: Final = 4096
"""Nodes whose logs are kept. Only nodes of the layout can call, so only a cluster's long life reaches this."""

LINES_MAX: Final = 4096
"""Lines appended to a file before it is rewritten: 8 MiB, three days of a busy node."""

CHAINS_A_PAGE: Final = 64
ALARMS_MAX: Final = 1024
ALARM_S: Final = 7 * 24 * 3600.0
"""How long an alarm stays in `storaged status`; after that only the log and the verifier have it."""

log = structlog.get_logger(__name__)


class WitnessRequest(Message, frozen=True):
    """Shows a checkpoint. The body has the hashes of the entries ``after + 1`` up to the checkpoint's, 32 bytes each.
    ``start``: entry 0 of a chain that is new to the witness.
    """

    checkpoint: Checkpoint
    after: int
    start: bytes = b""


class WitnessReply(Message, frozen=True):
    """Accepted when ``taken``. Otherwise refused if there is a ``reason``; else the node must continue after
    ``sequence``, the last entry that the witness has.

    ``problem``: why the chain does not follow from what the witness saw before; it stays for ever.
    """

    taken: bool
    sequence: int
    reason: str = ""
    problem: str = ""


class WitnessedRequest(Message, frozen=True):
    """Asks what the witness remembers of the log of ``node``, from its chain number ``skip`` on. ``heads``: only the
    newest chains and their last entries.
    """

    node: str
    skip: int = 0
    heads: bool = False


class WitnessedReply(Message, frozen=True):
    """The body has the lines, unless heads were asked for. ``next``: where the next page begins, 0 after the last one.
    ``chains``: their total number.
    """

    chains: int
    next: int
    damaged_lines: int
    heads: tuple[tuple[str, int], ...] = ()


@dataclass
class _File:
    """The file of one node."""

    path: Path
    seen: SeenNode
    lines: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class WitnessBook:
    """All that this node has seen of other nodes' audit logs. ``trail``: this node's own log, which notes refusals."""

    def __init__(self, directory: Path, authority: x509.Certificate, clock: Clock | None = None) -> None:
        """Reads the existing files. A node whose file can't be read is not witnessed: a witness must not lose what it
        saw.
        """
        self.directory = directory
        self._authority = authority
        self._files: dict[str, _File] = {}
        self._alarms: dict[str, tuple[str, float]] = {}
        self._clock = clock or SystemClock()
        self._working: set[asyncio.Task[WitnessReply]] = set()
        self.trail: Trail | None = None
        self._unreadable: dict[str, str] = {}
        for path in sorted(directory.glob("*.jsonl")) if directory.is_dir() else ():
            try:
                self._files[path.stem] = self._open(path)
            except OSError as error:
                log.error(
                    "what was witnessed cannot be read; nothing is taken of this node",
                    file=str(path),
                    reason=str(error),
                )
                self._unreadable[path.stem] = f"{path} cannot be read: {error.strerror or error}"

    def _open(self, path: Path) -> _File:
        data = path.read_bytes()
        lines = data.splitlines(keepends=True)
        seen = read(lines)
        torn = bool(lines) and not lines[-1].endswith(b"\n")
        if seen.damaged_lines > torn:
            log.error(
                "lines of what was witnessed are damaged; the file is kept beside",
                file=str(path),
                lines=seen.damaged_lines,
            )
            replace_file(path.with_suffix(".damaged"), data)
        if seen.damaged_lines:  # an appended line must not continue a torn one
            replace_file(path, _whole(seen))
        return _File(path, seen, len(lines))

    def methods(self) -> Methods:
        methods = {
            "audit.witness": Method(WitnessRequest, self._witness),
            "audit.witnessed": Method(WitnessedRequest, self._witnessed),
        }
        return grant(methods)

    def alarms(self) -> list[tuple[str, str]]:
        """Each node with a problem in its log, and the problem: seen by this process within ALARM_S, or in the node's
        newest chain.
        """
        now = self._clock.monotonic()
        lately = {node: reason for node, (reason, since) in self._alarms.items() if now - since < ALARM_S}
        found = {
            node: chain.problem
            for node, file in self._files.items()
            if (newest := file.seen.newest) and (chain := file.seen.chains[newest]).problem
        }
        return sorted((found | lately).items())

    async def _witness(self, request: WitnessRequest, call: Call) -> WitnessReply:
        checkpoint, node = request.checkpoint, call.peer.name
        if (reason := self._unreadable.get(node)) is not None:
            raise ServiceUnavailable(reason)
        try:
            self._verify(checkpoint, node)
        except StoragedError as error:
            return self._refuse(node, checkpoint, error.message)
        if len(call.body) % HASH_BYTES or len(call.body) > HASHES_MAX * HASH_BYTES:
            return self._refuse(node, checkpoint, f"the body is {HASHES_MAX} hashes of {HASH_BYTES} bytes at most")
        body = bytes(call.body)
        hashes = [body[at : at + HASH_BYTES] for at in range(0, len(body), HASH_BYTES)]
        file = self._files.get(node)
        if file is None:
            if len(self._files) >= NODES_MAX:
                return self._refuse(
                    node, checkpoint, f"the logs of {NODES_MAX} nodes are known here; no further one is accepted"
                )
            file = self._files[node] = _File(self.directory / f"{node}.jsonl", SeenNode())
        work = asyncio.get_running_loop().create_task(self._judge(file, request, hashes))
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        return await asyncio.shield(work)

    async def _judge(self, file: _File, request: WitnessRequest, hashes: Sequence[bytes]) -> WitnessReply:
        """Runs in a task of its own, so that a caller that disconnects does not leave on disk what memory lacks."""
        checkpoint = request.checkpoint
        node = checkpoint.node
        async with file.lock:
            judged = judge(file.seen, checkpoint, request.after, request.start, hashes)
            if isinstance(judged, Behind):
                return WitnessReply(False, judged.sequence)
            if isinstance(judged, Refused):
                return self._refuse(node, checkpoint, judged.reason)
            new = checkpoint.chain not in file.seen.chains
            await self._accept(file, judged)
        if judged.problem and new:
            self._report(node, checkpoint, judged.problem, "AUDIT_CHAIN_BROKEN")
        return WitnessReply(True, checkpoint.sequence, problem=judged.problem)

    def _verify(self, checkpoint: Checkpoint, node: str) -> None:
        signer = signed_by_node(
            self._authority, checkpoint.certificate, checkpoint.signed_bytes(), checkpoint.signature
        )
        if not signer.name == checkpoint.node == node:
            raise CertificateRefused(f"a checkpoint of {checkpoint.node}, signed by {signer.name}, was sent by {node}")

    async def _accept(self, file: _File, accepted: Accepted) -> None:
        """Writes what was accepted to disk, then applies it in memory. Raises ServiceUnavailable, and then applies
        nothing.
        """
        if accepted.seen is None:
            return
        line = render(accepted.seen)
        try:
            await asyncio.to_thread(_append, file.path, line)
        except OSError as error:
            raise ServiceUnavailable(f"What was witnessed cannot be written: {error.strerror or error}.") from None
        adopt(file.seen, accepted.seen)
        file.lines += 1
        if file.lines >= LINES_MAX + 2 * len(file.seen.chains):
            try:
                await asyncio.to_thread(_rewrite, file)
            except OSError as error:
                log.warning(
                    "a file of what was witnessed cannot be made anew",
                    file=str(file.path),
                    reason=error.strerror or str(error),
                )
            file.lines = sum(1 + len(chain.marks) for chain in file.seen.chains.values())

    def _refuse(self, node: str, checkpoint: Checkpoint, reason: str) -> WitnessReply:
        self._report(node, checkpoint, reason, "AUDIT_REFUSED_BY_WITNESS")
        return WitnessReply(False, -1, reason or "refused")

    def _report(self, node: str, checkpoint: Checkpoint, reason: str, code: str) -> None:
        if self._alarms.get(node, ("", 0.0))[0] != reason:  # repeated attempts of a node do not fill the log
            log.error(
                "the audit log of a node does not extend what was seen of it",
                peer=node,
                chain=checkpoint.chain,
                reason=reason,
            )
        if node in self._alarms or len(self._alarms) < ALARMS_MAX:
            self._alarms[node] = reason, self._clock.monotonic()
        if self.trail is not None:
            self.trail.refused(
                "audit.witness", code, actor=f"node:{node}", target=f"chain:{checkpoint.chain}", reason=reason
            )

    async def _witnessed(self, request: WitnessedRequest, _call: Call) -> WitnessedReply | Reply:
        if (reason := self._unreadable.get(request.node)) is not None:
            raise ServiceUnavailable(reason)
        file = self._files.get(request.node)
        if file is None:
            return WitnessedReply(0, 0, 0)
        chains = list(file.seen.chains.items())
        if request.heads:
            heads = tuple((name, chain.checkpoint.sequence) for name, chain in chains[-HASHES_MAX:])
            return WitnessedReply(len(chains), 0, file.seen.damaged_lines, heads)
        begin = max(0, request.skip)
        page = chains[begin : begin + CHAINS_A_PAGE]
        end = begin + len(page)
        body = await asyncio.to_thread(
            lambda: b"".join(line for name, chain in page for line in render_whole(name, chain))
        )
        return Reply(WitnessedReply(len(chains), end if end < len(chains) else 0, file.seen.damaged_lines), [body])


def _whole(seen: SeenNode) -> bytes:
    return b"".join(line for name, chain in seen.chains.items() for line in render_whole(name, chain))


def _rewrite(file: _File) -> None:
    replace_file(file.path, _whole(file.seen))


def _append(path: Path, line: bytes) -> None:
    """Appends a line, durable when it returns. Removes what was written when it fails. Raises OSError."""
    new = not path.exists()
    if new:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        append_durably(descriptor, line, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    if new:
        sync_path(path.parent)
        sync_path(path.parent.parent)


def read_file(path: Path) -> SeenNode:
    """Reads a saved file of a witness. Raises OSError."""

    def lines() -> Sequence[bytes]:
        with path.open("rb") as file:
            return list(iter(lambda: file.readline(LINE_BYTES_MAX), b""))

    return read(lines())
