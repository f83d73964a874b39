"""Headers of Object Lock: the lock that a request asks for, and what an answer says of one."""

from __future__ import annotations

from collections.abc import Mapping

from storaged import errors
from storaged.objects.code.lock import COMPLIANCE, GOVERNANCE
from storaged.objects.records import Lock
from storaged.s3 import xml
from storaged.s3.conditions import parse_time

MODES = (GOVERNANCE, COMPLIANCE)

_MODE = "x-amz-object-lock-mode"
_UNTIL = "x-amz-object-lock-retain-until-date"
_HOLD = "x-amz-object-lock-legal-hold"
_BYPASS = "x-amz-bypass-governance-retention"


def asked_lock(headers: Mapping[str, str]) -> Lock | None:
    """The lock of a new version. Raises InvalidArgument."""
    mode, until, hold = headers.get(_MODE), headers.get(_UNTIL), headers.get(_HOLD)
    if mode is None and until is None and hold is None:
        return None
    if (mode is None) != (until is None):
        raise errors.InvalidArgument(f"{_UNTIL} and {_MODE} must both be supplied", ArgumentName=_MODE)
    until_ms = parse_time(until) if until is not None else 0
    if mode is not None and mode not in MODES:
        raise errors.InvalidArgument("Unknown wormMode directive.", ArgumentName=_MODE, ArgumentValue=mode)
    if until_ms is None:
        raise errors.InvalidArgument(
            "The retain until date must be provided in ISO 8601 format", ArgumentName=_UNTIL, ArgumentValue=until or ""
        )
    if hold not in (None, "ON", "OFF"):
        raise errors.InvalidArgument(
            "Legal Hold must be either of 'ON' or 'OFF'", ArgumentName=_HOLD, ArgumentValue=hold or ""
        )
    return Lock(mode or "", until_ms, hold == "ON", hold == "OFF")


def bypasses(headers: Mapping[str, str]) -> bool:
    """Whether governance is to be bypassed. Whether the sender may was decided before the handler."""
    return headers.get(_BYPASS, "false").lower() == "true"


def lock_headers(lock: Lock | None, headers: dict[str, str]) -> None:
    """What the answer of a read says of the version's lock. A legal hold of which nobody ever said anything is not
    shown, as on AWS: Terraform would take it for a setting to remove.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html"""
    if lock is None:
        return
    if lock.mode:
        headers[_MODE] = lock.mode
        headers[_UNTIL] = xml.iso_time(lock.until_ms)
    if lock.hold or lock.released:
        headers[_HOLD] = "ON" if lock.hold else "OFF"
