"""Checks the value of one option: its type, its range, its form."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from storaged.config.sections import (
    KEEP_DAYS_MIN,
    LOG_FORMATS,
    LOG_LEVELS,
    NEW_BUCKETS,
    ROLES,
    SMALL_OBJECT_BYTES_MAX,
)
from storaged.units import GIB, KIB, MIB, format_size, parse_size


def did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known))}"


def _one_of(*choices: str) -> Callable[[Any], None]:
    def check(value: str) -> None:
        if value not in choices:
            raise ValueError(f"{value!r} is not a choice{did_you_mean(value, choices)}")

    return check


def _check_roles(value: list[str]) -> None:
    if not value:
        raise ValueError(f"is empty; there are: {', '.join(ROLES)}")
    for role in value:
        _one_of(*ROLES)(role)


def _check_name(value: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError(f"{value!r}: a node's name is 1 to 63 lower-case letters, digits and inner hyphens")


def _check_disk_id(value: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{16}", value):
        raise ValueError(f"{value!r} is not a disk id (16 hex digits, as in the layout)")


def split_address(text: str) -> tuple[str, int]:
    """``127.0.0.1:8333``, ``[::1]:8333``, ``host:8333`` -> host, port. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, as in [::1]:8333")
    return host.strip("[]"), int(port)


def _check_address(value: str) -> None:
    if value:
        split_address(value)


def _check_loopback(value: str) -> None:
    """Health and metrics are not authenticated, so they must stay on this machine."""
    if not value:
        return
    host, _ = split_address(value)
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise ValueError(
            f"{value!r} is not a loopback address; metrics are not authenticated, so put a proxy before them to export"
            " them"
        )


def _check_region(value: str) -> None:
    if not re.fullmatch(r"[a-z0-9-]{1,63}", value):
        raise ValueError(f"{value!r}: a region is 1 to 63 lower-case letters, digits and hyphens")


def _check_domain(value: str) -> None:
    if value and not re.fullmatch(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*", value):
        raise ValueError(f"{value!r} is not a domain name in lower case, as in web.example.eu")


def _check_destination(value: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
        raise ValueError(f"{value!r}: the name of a destination is 1 to 64 letters, digits, hyphens and underscores")


def _check_destination_url(value: str) -> None:
    found = urlsplit(value)
    if found.scheme not in ("http", "https", "nats", "tls") or not found.hostname or found.username is not None:
        raise ValueError(
            f"{value!r} is not a destination: https://host/path, http://host/path, nats://host:port/subject or"
            " tls://host:port/subject, without a user (see the option secret)"
        )
    if found.scheme in ("nats", "tls") and not re.fullmatch(r"/[^\s.*>/]+(\.[^\s.*>/]+)*", found.path):
        raise ValueError(f"{value!r}: the path names the subject, as in nats://host:4222/storaged.events")


def _check_networks(value: list[str]) -> None:
    for text in value:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            raise ValueError(f"{text!r} is not an address or a network, as in 10.0.0.5 or 2001:db8::/64") from None


def _between(low: int, high: int) -> Callable[[Any], None]:
    def check(value: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"{value!r} is outside {low} .. {high}")

    return check


def _zero_or_between(low: int, high: int) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if value:
            _between(low, high)(value)

    return check


def _size_between(low: int, high: int) -> Callable[[Any], None]:
    def check(value: int) -> None:
        if not low <= value <= high:
            raise ValueError(f"{format_size(value)} is outside {format_size(low)} .. {format_size(high)}")

    return check


_CHECKS: dict[tuple[str, str], Callable[[Any], None]] = {
    ("node", "name"): _check_name,
    ("node", "roles"): _check_roles,
    ("disks", "id"): _check_disk_id,
    ("rpc", "listen"): _check_address,
    ("s3", "listen"): _check_address,
    ("s3", "region"): _check_region,
    ("s3", "workers"): _between(1, 64),
    ("s3", "unauthenticated_connections_max"): _between(16, 1_000_000),
    ("s3", "unauthenticated_requests_max"): _between(16, 1_000_000),
    ("s3", "unauthenticated_bytes_max"): _size_between(MIB, 64 * GIB),
    ("notifications", "name"): _check_destination,
    ("notifications", "url"): _check_destination_url,
    ("notifications", "timeout_s"): _between(1, 60),
    ("s3", "website_domain"): _check_domain,
    ("s3", "access_log_interval_s"): _between(1, 86_400),
    ("s3", "access_log_bytes_max"): _size_between(64 * KIB, GIB),
    ("s3", "proxies"): _check_networks,
    ("admin", "listen"): _check_loopback,
    ("audit", "file_bytes_max"): _size_between(64 * KIB, GIB),
    ("audit", "keep_days"): _zero_or_between(KEEP_DAYS_MIN, 36_500),
    ("limits", "s3_requests_max"): _between(1, 100_000),
    ("limits", "rpc_inflight_bytes_max"): _size_between(64 * MIB, 16 * GIB),
    ("limits", "meta_map_bytes"): _size_between(16 * MIB, 64 * 1024 * GIB),
    ("limits", "segment_bytes"): _size_between(8 * MIB, 4 * GIB),
    ("limits", "drain_s"): _between(0, 600),
    ("limits", "recode_delay_s"): _zero_or_between(10, 30 * 86_400),
    ("limits", "drop_delay_s"): _between(10, 30 * 86_400),
    ("limits", "retire_delay_s"): _between(10, 30 * 86_400),
    ("limits", "read_hold_s"): _between(0, 30 * 86_400),
    ("limits", "upload_expire_s"): _between(0, 3_650 * 86_400),
    ("limits", "expunge_delay_s"): _between(3_600, 365 * 86_400),
    ("limits", "lifecycle_day_s"): _between(1, 86_400),
    ("limits", "lifecycle_per_s"): _between(1, 100_000),
    ("limits", "small_object_bytes_max"): _size_between(0, SMALL_OBJECT_BYTES_MAX),
    ("log", "level"): _one_of(*LOG_LEVELS),
    ("s3", "new_buckets"): _one_of(*NEW_BUCKETS),
    ("log", "format"): _one_of(*LOG_FORMATS),
}


def check_value(section: str, option: str, kind: Any, value: Any) -> Any:
    if kind is int and option.endswith(("_bytes", "_bytes_max")) and isinstance(value, str):
        value = parse_size(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a list of texts")
    right = (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
        if kind == list[str]
        else type(value) is kind
    )
    if not right:
        raise ValueError(f"wants {wanted}, not {value!r}")
    check = _CHECKS.get((section, option))
    if check is not None:
        check(value)
    elif isinstance(value, int | float) and value < 0:
        raise ValueError(f"cannot be negative: {value!r}")
    return value
