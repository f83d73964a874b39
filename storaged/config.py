"""The configuration of one node: a TOML file, read strictly, with every mistake listed at once.

Paths are relative to the file's own folder, so that a node's folder can be moved. Sizes are integers (bytes) or text
(``"64 MiB"``). ``$CREDENTIALS_DIRECTORY`` at the start of a path is where systemd puts what ``LoadCredential=`` names.

    [node]     name, directory, roles
    [cluster]  identity (the folder with this node's certificate, the cluster's authority and the layout)
    [[disks]]  id, directory            (role storage; one table a disk)
    [rpc]      listen
    [s3]       listen, workers, region, strict_region, domains, tls_certificate, tls_key, unauthenticated_*_max, proxies
    (role gateway)
    [admin]    listen
    [keys]     keyring, credential or passphrase                       (role gateway)
    [audit]    directory
    [limits]   bounds with their unit in the name
    [log]      level, format, access, slow_ms
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from storaged.errors import ConfigInvalid
from storaged.units import GIB, KIB, MIB, format_size, parse_size

ROLES = ("storage", "gateway")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "journal", "json", "console", "logfmt")
SYNTAX_ERRORS_MAX = 20


class NodeSection(msgspec.Struct, frozen=True):
    """``directory`` holds what belongs to the node itself: lock, admin socket, known layouts, which store each disk
    had.
    """

    name: str
    directory: str
    roles: list[str]


class ClusterSection(msgspec.Struct, frozen=True):
    identity: str


class DiskSection(msgspec.Struct, frozen=True):
    """``id`` is the disk's id in the layout, 16 hex digits."""

    id: str
    directory: str


class RpcSection(msgspec.Struct, frozen=True):
    """Where other nodes reach this one. Empty for a gateway that nobody calls."""

    listen: str = ""


class S3Section(msgspec.Struct, frozen=True):
    """``domains``: names under which buckets appear as the first label of the host (virtual-host style). ``workers``:
    processes that share the port. ``region``: told to clients. ``strict_region``: refuse signatures and new buckets of
    any other; else every region is accepted. ``unauthenticated_*_max``: what one address (a /64 of IPv6) may have of
    connections, requests and bytes before they have authenticated; beyond, the oldest is closed. ``proxies``: addresses
    and networks without these limits, since all clients come from there.
    """

    listen: str = "127.0.0.1:8333"
    workers: int = 1
    region: str = "eu-fr-1"
    strict_region: bool = False
    domains: list[str] = []
    tls_certificate: str = ""
    tls_key: str = ""
    unauthenticated_connections_max: int = 2048
    unauthenticated_requests_max: int = 256
    unauthenticated_bytes_max: int = 64 * MIB
    proxies: list[str] = []


class AdminSection(msgspec.Struct, frozen=True):
    """``listen``: health and metrics over HTTP, empty for none; administration itself is on the Unix socket in the
    node's directory only.
    """

    listen: str = ""


class KeysSection(msgspec.Struct, frozen=True):
    """What opens the keyring: ``credential`` names a file of 32 random bytes, ``passphrase`` a file whose first line is
    the passphrase.
    """

    keyring: str = ""
    credential: str = ""
    passphrase: str = ""


KEEP_DAYS_MIN = 180


class AuditSection(msgspec.Struct, frozen=True):
    """``directory`` empty: ``audit`` in the node's directory. A chain file is closed, and a new one begun, at
    ``file_bytes_max``. A file whose last entry is older than ``keep_days`` is removed; 0: none ever is. Never before
    six months (180 days) are over.
    """

    directory: str = ""
    file_bytes_max: int = 64 * MIB
    keep_days: int = 190


class LimitsSection(msgspec.Struct, frozen=True):
    """Bounds of one node; those of S3 are shared out among a gateway's workers. ``recode_delay_s``: how long a disk may
    be away before repair recodes blocks for the others. ``meta_map_bytes`` is address space for a disk's LMDB, taken
    from the disk only as rows are written. ``reserve_bytes`` stays free on every disk for deletes, repair and the ring;
    0: a twentieth of the file system.
    """

    s3_requests_max: int = 1024
    rpc_inflight_bytes_max: int = 64 * MIB
    meta_map_bytes: int = 64 * GIB
    segment_bytes: int = 256 * MIB
    reserve_bytes: int = 0
    drain_s: float = 25.0
    small_object_bytes_max: int = 16 * KIB
    recode_delay_s: float = 600.0


class LogSection(msgspec.Struct, frozen=True):
    """``auto``: journal format under systemd, colour on a terminal, logfmt else.

    ``access``: a line at level info for every S3 request. ``slow_ms``: a warning for a request that takes longer,
    beyond the time that its bytes may take; 0 for none.
    """

    level: str = "info"
    format: str = "auto"
    access: bool = False
    slow_ms: int = 10_000


class Config(msgspec.Struct, frozen=True):
    """A checked configuration; every path in it is absolute."""

    node: NodeSection
    cluster: ClusterSection
    disks: list[DiskSection] = []
    rpc: RpcSection = RpcSection()
    s3: S3Section = S3Section()
    admin: AdminSection = AdminSection()
    keys: KeysSection = KeysSection()
    audit: AuditSection = AuditSection()
    limits: LimitsSection = LimitsSection()
    log: LogSection = LogSection()
    path: str = ""

    @property
    def gateway(self) -> bool:
        return "gateway" in self.node.roles

    @property
    def storage(self) -> bool:
        return "storage" in self.node.roles


class Mistake(NamedTuple):
    """One thing wrong. ``line`` counts from 1; 0 when something is missing altogether."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "node": NodeSection,
    "cluster": ClusterSection,
    "disks": DiskSection,
    "rpc": RpcSection,
    "s3": S3Section,
    "admin": AdminSection,
    "keys": KeysSection,
    "audit": AuditSection,
    "limits": LimitsSection,
    "log": LogSection,
}
_REQUIRED_SECTIONS = ("node", "cluster")
_PATHS = {
    "node": ("directory",),
    "cluster": ("identity",),
    "disks": ("directory",),
    "s3": ("tls_certificate", "tls_key"),
    "keys": ("keyring", "credential", "passphrase"),
    "audit": ("directory",),
}


def load(path: str | Path) -> Config:
    """Reads and checks ``path``. Raises ConfigInvalid whose message lists every mistake, one a line."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigInvalid(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{file}: cannot be read: {error}") from None
    config, mistakes = parse(text, file.absolute().parent)
    if config is None:
        listed = "\n".join(f"  {mistake}" for mistake in mistakes)
        count = len(mistakes)
        raise ConfigInvalid(f"{file}: {count} mistake{'s' if count > 1 else ''}\n{listed}")
    return msgspec.structs.replace(config, path=str(file.absolute()))


def parse(text: str, base: Path) -> tuple[Config | None, list[Mistake]]:
    """The configuration, or None and all mistakes in the order of their lines."""
    document, mistakes = _parse_toml(text)
    lines = _lines_of(text)
    for name in document:
        if name not in SECTIONS:
            mistakes.append(
                Mistake(lines.get((name,), 0), f"there is no section or option [{name}]{_did_you_mean(name, SECTIONS)}")
            )
    values: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        if name == "disks":
            values[name] = _check_disks(document.get(name, []), lines, mistakes)
        elif name in document or name in _REQUIRED_SECTIONS:
            if name not in document:
                mistakes.append(Mistake(0, f"section [{name}] is missing"))
                continue
            values[name] = _check_table((name,), kind, document[name], lines, mistakes)
    mistakes.extend(_check_together(values, document, lines))
    if mistakes:
        return None, sorted(mistakes, key=lambda mistake: mistake.line or 1 << 30)
    for name, fields in _PATHS.items():
        for table in values[name] if name == "disks" else [values.get(name, {})]:
            for field in fields:
                if table.get(field):
                    table[field] = _absolute(table[field], base)
    return msgspec.convert(values, Config), []


def _parse_toml(text: str) -> tuple[dict[str, Any], list[Mistake]]:
    """tomllib stops at the first error of syntax: that line is blanked and the rest read on, so that later mistakes are
    listed as well.
    """
    mistakes: list[Mistake] = []
    lines = text.split("\n")
    while True:
        try:
            return tomllib.loads("\n".join(lines)), mistakes
        except tomllib.TOMLDecodeError as error:
            message, _, place = str(error).partition(" (at ")
            match = re.match(r"line (\d+)", place)
            number = int(match[1]) if match else len(lines)
            mistakes.append(Mistake(number, f"not TOML: {message}: {lines[number - 1].strip()!r}"))
            if len(mistakes) >= SYNTAX_ERRORS_MAX or not lines[number - 1].strip():
                return {}, mistakes
            lines[number - 1] = ""


_HEADER = re.compile(r"\s*\[\[?\s*([A-Za-z0-9_.\-]+)\s*\]\]?")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-]+)\s*=")


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """(section, option) and (section,) -> the line that says it; for ``[[disks]]`` (disks, index, option)."""
    found: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if match := _HEADER.match(line):
            name = match[1]
            found.setdefault((name,), number)
            section = (name,)
            if line.lstrip().startswith("[["):
                section = (name, str(counts.get(name, 0)))
                counts[name] = counts.get(name, 0) + 1
            found.setdefault(section, number)
        elif match := _KEY.match(line):
            found.setdefault((*section, match[1]), number)
    return found


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known))}"


def _check_disks(tables: Any, lines: dict[tuple[str, ...], int], mistakes: list[Mistake]) -> list[dict[str, Any]]:
    if not isinstance(tables, list):
        mistakes.append(Mistake(lines.get(("disks",), 0), "disks is a list of tables: write [[disks]], once a disk"))
        return []
    return [
        _check_table(("disks", str(index)), DiskSection, table, lines, mistakes) for index, table in enumerate(tables)
    ]


def _check_table(
    place: tuple[str, ...],
    kind: type[msgspec.Struct],
    table: Any,
    lines: dict[tuple[str, ...], int],
    mistakes: list[Mistake],
) -> dict[str, Any]:
    """The options of a table that hold; what does not is added to ``mistakes``."""
    name = place[0]
    if not isinstance(table, dict):
        mistakes.append(Mistake(lines.get(place, 0), f"{name} is a section: write [{name}] on a line of its own"))
        return {}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    good: dict[str, Any] = {}
    for option, value in table.items():
        line = lines.get((*place, option), lines.get(place, 0))
        if option not in fields:
            mistakes.append(Mistake(line, f"[{name}] has no option {option!r}{_did_you_mean(option, fields)}"))
            continue
        try:
            good[option] = _check_value(name, option, fields[option].type, value)
        except ValueError as error:
            mistakes.append(Mistake(line, f"{name}.{option}: {error}"))
    missing = [field.name for field in fields.values() if field.required and field.name not in table]
    mistakes.extend(Mistake(lines.get(place, 0), f"[{name}] lacks the option {option!r}") for option in missing)
    return good


def _check_value(section: str, option: str, kind: Any, value: Any) -> Any:
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


def _one_of(*choices: str) -> Callable[[Any], None]:
    def check(value: str) -> None:
        if value not in choices:
            raise ValueError(f"{value!r} is not a choice{_did_you_mean(value, choices)}")

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
    """Health and metrics are not authenticated: they stay on this machine."""
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
    ("s3", "proxies"): _check_networks,
    ("admin", "listen"): _check_loopback,
    ("audit", "file_bytes_max"): _size_between(64 * KIB, GIB),
    ("audit", "keep_days"): _zero_or_between(KEEP_DAYS_MIN, 36_500),
    ("limits", "s3_requests_max"): _between(1, 100_000),
    ("limits", "rpc_inflight_bytes_max"): _size_between(64 * MIB, 16 * GIB),
    ("limits", "meta_map_bytes"): _size_between(16 * MIB, 64 * 1024 * GIB),
    ("limits", "segment_bytes"): _size_between(8 * MIB, 4 * GIB),
    ("limits", "drain_s"): _between(0, 600),
    ("limits", "recode_delay_s"): _between(10, 30 * 86_400),
    ("limits", "small_object_bytes_max"): _size_between(0, 64 * KIB),
    ("log", "level"): _one_of(*LOG_LEVELS),
    ("log", "format"): _one_of(*LOG_FORMATS),
}


def _check_together(
    values: dict[str, Any], document: dict[str, Any], lines: dict[tuple[str, ...], int]
) -> Iterator[Mistake]:
    """What is wrong only in the light of something else."""
    roles = values.get("node", {}).get("roles", [])
    disks = values.get("disks", [])
    node_line = lines.get(("node", "roles"), lines.get(("node",), 0))
    if "storage" in roles and not document.get("disks"):
        yield Mistake(node_line, "the role storage wants at least one [[disks]] table")
    if roles and "storage" not in roles and disks:
        yield Mistake(lines.get(("disks",), 0), "[[disks]] are of use only to the role storage")
    if "storage" in roles and not document.get("rpc", {}).get("listen"):
        yield Mistake(lines.get(("rpc",), node_line), "the role storage wants rpc.listen, the address other nodes call")
    for field in ("id", "directory"):
        seen: dict[str, int] = {}
        for index, disk in enumerate(disks):
            value = disk.get(field)
            if value in seen and value is not None:
                yield Mistake(
                    lines.get(("disks", str(index), field), 0),
                    f"disks.{field}: {value!r} is also that of disk {seen[value] + 1}",
                )
            seen.setdefault(value, index)
    keys = values.get("keys", {})
    keys_line = lines.get(("keys",), node_line)
    if "gateway" in roles:
        if not keys.get("keyring"):
            yield Mistake(keys_line, "the role gateway wants keys.keyring, the keyring's file")
        if bool(keys.get("credential")) == bool(keys.get("passphrase")):
            yield Mistake(keys_line, "[keys] wants one of credential and passphrase: what opens the keyring")
    elif roles and "keys" in document:
        yield Mistake(keys_line, "[keys] belongs to gateways: a storage node never has keys")
    s3 = values.get("s3", {})
    if bool(s3.get("tls_certificate")) != bool(s3.get("tls_key")):
        yield Mistake(lines.get(("s3",), 0), "[s3] wants both tls_certificate and tls_key, or neither")
    if "storage" in roles and s3.get("workers", 1) > 1:
        yield Mistake(
            lines.get(("s3", "workers"), 0),
            "s3.workers: a node with disks is one process; give the gateway a node of its own to have several",
        )


def _absolute(text: str, base: Path) -> str:
    if text.startswith("$CREDENTIALS_DIRECTORY"):
        text = os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials") + text.removeprefix("$CREDENTIALS_DIRECTORY")
    return os.path.normpath(base / Path(text).expanduser())
