"""The checks of ``storaged doctor``: what will hurt later."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from storaged.admin.status import SKEW_MS_MAX
from storaged.cluster.layout import NodeEntry
from storaged.errors import (
    BucketKeyDamaged,
    CertificateRevoked,
    ClockSkewed,
    KeyReleasesRefused,
    KeyringMismatch,
    KeysNotBackedUp,
)
from storaged.node.opener import in_own_thread
from storaged.node.planes import NodePlanes
from storaged.units import format_duration, format_size

if TYPE_CHECKING:  # a storage node imports neither the key plane nor S3
    from storaged.node.gateway import Gateway

CERTIFICATE_DAYS_MIN = 30
ENDED_KEY_AGE_S_MAX = 86_400.0
FREE_SHARE_MIN = 0.1
FSYNC_S_MAX = 10.0
RTT_SITE_MS_MAX = 2.0
"""Nodes of one site answer within this: a millisecond of round trip is 100 km of fibre at most."""

WITNESSES_HINT = (
    "Each other node with disks witnesses it, within a minute of its start; see deploy/README.md, The audit log."
)


class Doctor:
    """Reads the node and its gateway; changes nothing."""

    def __init__(self, node: NodePlanes, gateway: Gateway | None) -> None:
        self._node, self._gateway = node, gateway

    async def checks(self) -> list[dict[str, str]]:
        """All checks as documents: ``name``, ``state`` (ok, warn, fail), ``detail``, ``hint``."""
        node = self._node
        checks = [_private(self._secret_files())]
        for entry in node.layouts.current.nodes:
            checks.extend(self._other_node(entry))
        if revoked := node.peers.own_revocation():
            checks.append(_check("own certificate", "fail", revoked, CertificateRevoked.hint))
        state, detail = node.auditing.check()
        checks.append(_check("audit log", state, detail, WITNESSES_HINT))
        if self._gateway is not None:
            checks.extend(self._gateway_checks(self._gateway))
        checks.append(await self._fsync())
        return checks

    async def _fsync(self) -> dict[str, str]:
        """In a thread of its own: a disk that hangs keeps it."""
        try:
            async with asyncio.timeout(FSYNC_S_MAX):
                return await in_own_thread(partial(_fsync, self._node.directory))
        except TimeoutError:
            detail = f"the node's directory has not answered for {FSYNC_S_MAX:.0f} s"
            return _check("fsync", "fail", detail, "Look at the kernel log for I/O errors and time-outs.")
        except OSError as error:
            detail = f"the node's directory can't be written: {error.strerror or error}"
            return _check("fsync", "fail", detail, f"Look at the space and the permissions of {self._node.directory}.")

    def _other_node(self, entry: NodeEntry) -> list[dict[str, str]]:
        node, name = self._node, entry.name
        known = node.membership.status(name)
        if known.state != "up" and silent(node, entry):
            detail = "not known here: it has no address, so that no other gateway can call it"
            return [_check(f"node {name}", "ok", detail, "")]
        if known.state != "up":
            hint = "Start it; see `storaged explain NODE_DOWN`."
            return [_check(f"node {name}", "fail", f"does not answer: {known.reason}", hint)]
        checks = [certificate_check(name, known.certificate_until_ms, node.clock.wall_ms())]
        checks.append(_clock(name, known.clock_skew_ms))
        checks.extend(
            _disk(name, disk.id, disk.state, disk.reason, disk.bytes_used, disk.bytes_free) for disk in known.disks
        )
        if known.rtt_min_ms is not None and name != node.own.name:
            checks.append(self._round_trip(name, entry.certified_location, known.rtt_min_ms))
        return checks

    def _gateway_checks(self, gateway: Gateway) -> list[dict[str, str]]:
        checks = [self._keys(gateway), *self._bucket_keys(gateway)]
        refusal = gateway.key_refusal
        state, detail = ("fail", refusal) if refusal else ("ok", "the policy allows it")
        checks.append(_check("key release", state, detail, KeyReleasesRefused.hint))
        if (workers := gateway.workers) is not None:
            state = "ok" if workers.serving == workers.count else "fail"
            detail = f"{workers.serving} of {workers.count} serve"
            checks.append(_check("workers", state, detail, "The log says why one ended."))
        return checks

    def _secret_files(self) -> list[Path]:
        node = self._node
        keys = node.config.keys
        named = [Path(name) for name in (keys.keyring, keys.credential, keys.passphrase) if name]
        return [node.own.directory / "node.key", *named]

    def _round_trip(self, name: str, location: str, rtt_ms: float) -> dict[str, str]:
        """Compares the round trip with the certified place. A slow answer is evidence against the place; a fast one is
        no proof.
        """
        own = self._node.own.peer
        country, site, _ = location.split("/")
        same_site = (country, site) == (own.country, own.site)
        far = same_site and rtt_ms > RTT_SITE_MS_MAX
        detail = f"fastest round trip {rtt_ms:.2f} ms, so at most {rtt_ms * 100:.0f} km away"
        return _check(
            f"distance of {name}",
            "warn" if far else "ok",
            detail,
            f"It is certified to stand in {site}, as this node, but answers too slowly for that.",
        )

    def _keys(self, gateway: Gateway) -> dict[str, str]:
        if gateway.problem or gateway.keyring is None:
            return _check("keyring", "fail", gateway.reason or "not open", KeyringMismatch.hint)
        keys = gateway.keyring.statistics()
        if keys.newest_epoch > keys.backed_up_epoch:
            return _check(
                "key backup",
                "warn",
                f"epoch {keys.newest_epoch} is in no backup ({KeysNotBackedUp.code})",
                KeysNotBackedUp.hint,
            )
        newer = gateway.copies.log.newer_than(keys.backed_up_ms) if gateway.copies is not None else 0
        detail = f"covers epoch {keys.backed_up_epoch}"
        if newer:
            detail += (
                f"; {newer} bucket key{'' if newer == 1 else 's'} newer than it: the ring and this gateway have them. A"
                " new backup now and then is good advice"
            )
        return _check("key backup", "ok", detail, "")

    def _bucket_keys(self, gateway: Gateway) -> list[dict[str, str]]:
        """Checks both homes of bucket keys: what the ring lost, and whether this gateway can write its copies."""
        if gateway.copies is None:
            return []
        copies, damaged = gateway.copies.log, gateway.key_damage()
        bad = sum(not damage.mended for damage in damaged)
        checks = []
        if damaged:
            detail = (
                f"{len(damaged)} damaged in the ring, {bad} of them not mended: key/{damaged[0].bucket}"
                f" {damaged[0].detail} ({BucketKeyDamaged.code})"
            )
            checks.append(_check("bucket keys", "fail" if bad else "warn", detail, BucketKeyDamaged.hint))
        elif copies.cut_bytes:
            detail = (
                f"the last {copies.cut_bytes} bytes of {copies.path} could not be read at the start, and were cut off"
            )
            checks.append(
                _check(
                    "bucket keys", "warn", detail, "The ring has those keys too: they are copied again within the hour."
                )
            )
        else:
            checks.append(_check("bucket keys", "ok", f"{copies.count} in {copies.path}", ""))
        if ends := gateway.key_ends.waiting:
            age_s = (self._node.clock.wall_ms() - gateway.key_ends.oldest_ms) / 1000
            late = age_s > ENDED_KEY_AGE_S_MAX
            waits = f"the oldest for {format_duration(max(0.0, age_s))}: {gateway.key_ends.reason}"
            detail = f"{ends} wait to be destroyed, {waits}"
            hint = "They go by themselves once every disk answers and nothing of the bucket is on a garbage list."
            checks.append(_check("keys of deleted buckets", "warn" if late else "ok", detail, hint))
        if copies.problem:
            checks.append(
                _check(
                    "copies of bucket keys",
                    "fail",
                    copies.problem,
                    "Until it can be written, buckets can't be created here.",
                )
            )
        return checks


def silent(node: NodePlanes, entry: NodeEntry) -> bool:
    """Whether this node can't know if ``entry`` is up: a gateway without an address calls storage nodes only."""
    hears = "storage" in node.own.peer.roles
    return not entry.address and "storage" not in entry.roles and entry.name != node.own.name and not hears


def _check(name: str, state: str, detail: str, hint: str) -> dict[str, str]:
    return {"name": name, "state": state, "detail": detail, "hint": hint if state != "ok" else ""}


def certificate_check(node: str, until_ms: int, now_ms: int) -> dict[str, str]:
    """``until_ms``: the expiry that the node reports, 0 when it reports none."""
    if not until_ms:
        return _check(f"certificate of {node}", "ok", "not known: the node does not say when it expires", "")
    days = (until_ms - now_ms) // 86_400_000
    state = "ok" if days >= CERTIFICATE_DAYS_MIN else "warn" if days > 0 else "fail"
    hint = f"Renew it: `storaged cluster renew AUTHORITY {node}`, which prints a ticket for `storaged node join` there."
    return _check(f"certificate of {node}", state, f"expires in {days} days", hint)


def _private(files: Sequence[Path]) -> dict[str, str]:
    """Checks that only the owner, and a group that the operator chose (as systemd does for credentials), may read
    secret files.
    """
    shown = []
    for file in files:
        try:
            mode = file.stat().st_mode
        except OSError:
            continue  # other checks report a missing file
        if mode & 0o007:
            shown.append(f"{file} has mode {mode & 0o777:04o}")
    return _check(
        "secret files",
        "fail" if shown else "ok",
        "; ".join(shown) or "private",
        "chmod o= FILE; who could log in here may have a copy.",
    )


def _clock(name: str, skew_ms: float | None) -> dict[str, str]:
    if skew_ms is None:
        return _check(f"clock of {name}", "ok", "not measured (it only calls, and is not called)", "")
    state = "warn" if abs(skew_ms) > SKEW_MS_MAX else "ok"
    return _check(f"clock of {name}", state, f"{round(skew_ms):+d} ms from this node's", ClockSkewed.hint)


def _disk(node: str, disk: str, state: str, reason: str, used: int, free: int) -> dict[str, str]:
    if state != "ok":
        return _check(f"disk {node}/{disk}", "fail", f"{state}: {reason}", "See `storaged status`.")
    scarce = free < FREE_SHARE_MIN * (used + free)
    return _check(
        f"disk {node}/{disk}",
        "warn" if scarce else "ok",
        f"{format_size(used)} used, {format_size(free)} free",
        "Delete data, or add disks.",
    )


def _fsync(directory: Path) -> dict[str, str]:
    """Measures how long 4 KiB take to become durable in the node's own directory: the median of nine."""
    path = directory / "doctor.new"
    times_ms = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(9):
            began = time.perf_counter()
            os.write(descriptor, bytes(4096))
            os.fdatasync(descriptor)
            times_ms.append((time.perf_counter() - began) * 1000)
    finally:
        os.close(descriptor)
        path.unlink()
    median = sorted(times_ms)[4]
    slow = median > 20
    return _check(
        "fsync",
        "warn" if slow else "ok",
        f"{median:.2f} ms for 4 KiB",
        "Every acknowledged write waits for this: use SSDs with power-loss protection.",
    )
