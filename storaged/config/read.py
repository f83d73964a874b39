"""Reads and checks a configuration file, and lists every mistake at once."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from storaged.config.sections import SECTIONS, Config
from storaged.config.values import check_value, did_you_mean
from storaged.errors import ConfigInvalid

SYNTAX_ERRORS_MAX = 20
NO_CREDENTIALS = "/run/credentials"
"""In place of $CREDENTIALS_DIRECTORY where systemd did not start the process. The credentials of a unit lie in a
directory below it, so none lies here.
"""
_REQUIRED_SECTIONS = ("node", "cluster")
_PATHS = {
    "node": ("directory",),
    "cluster": ("identity",),
    "disks": ("directory",),
    "s3": ("tls_certificate", "tls_key"),
    "keys": ("keyring", "credential", "passphrase"),
    "audit": ("directory",),
    "notifications": ("secret", "authority"),
}
_LISTS = {"disks": "disk", "notifications": "destination"}
"""Sections that are lists of tables, and what each table is."""


class Mistake(NamedTuple):
    """One mistake. ``line`` counts from 1; 0 when something is missing."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


def load(path: str | Path) -> Config:
    """Reads and checks ``path``. Raises ConfigInvalid whose message lists every mistake, one per line."""
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
    """The configuration; or None, and all mistakes in the order of their lines."""
    document, mistakes = _parse_toml(text)
    lines = _lines_of(text)
    for name in document:
        if name not in SECTIONS:
            mistakes.append(
                Mistake(lines.get((name,), 0), f"there is no section or option [{name}]{did_you_mean(name, SECTIONS)}")
            )
    values: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        if name in _LISTS:
            values[name] = _check_list(name, kind, document.get(name, []), lines, mistakes)
        elif name in document or name in _REQUIRED_SECTIONS:
            if name not in document:
                mistakes.append(Mistake(0, f"section [{name}] is missing"))
                continue
            values[name] = _check_table((name,), kind, document[name], lines, mistakes)
    mistakes.extend(_check_together(values, document, lines))
    if mistakes:
        return None, sorted(mistakes, key=lambda mistake: mistake.line or 1 << 30)
    for name, fields in _PATHS.items():
        for table in values[name] if name in _LISTS else [values.get(name, {})]:
            for field in fields:
                if table.get(field):
                    table[field] = _absolute(table[field], base)
    return msgspec.convert(values, Config), []


def _parse_toml(text: str) -> tuple[dict[str, Any], list[Mistake]]:
    """Parses TOML past syntax errors: tomllib stops at the first one, so this blanks that line and parses again."""
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
    """(section, option) and (section,) -> its line; for ``[[disks]]`` (disks, index, option)."""
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


def _check_list(
    name: str, kind: type[msgspec.Struct], tables: Any, lines: dict[tuple[str, ...], int], mistakes: list[Mistake]
) -> list[dict[str, Any]]:
    if not isinstance(tables, list):
        mistakes.append(
            Mistake(lines.get((name,), 0), f"{name} is a list of tables: write [[{name}]], once a {_LISTS[name]}")
        )
        return []
    return [_check_table((name, str(index)), kind, table, lines, mistakes) for index, table in enumerate(tables)]


def _check_table(
    place: tuple[str, ...],
    kind: type[msgspec.Struct],
    table: Any,
    lines: dict[tuple[str, ...], int],
    mistakes: list[Mistake],
) -> dict[str, Any]:
    """The valid options of a table; the others are added to ``mistakes``."""
    name = place[0]
    if not isinstance(table, dict):
        mistakes.append(Mistake(lines.get(place, 0), f"{name} is a section: write [{name}] on a line of its own"))
        return {}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    good: dict[str, Any] = {}
    for option, value in table.items():
        line = lines.get((*place, option), lines.get(place, 0))
        if option not in fields:
            mistakes.append(Mistake(line, f"[{name}] has no option {option!r}{did_you_mean(option, fields)}"))
            continue
        try:
            good[option] = check_value(name, option, fields[option].type, value)
        except ValueError as error:
            mistakes.append(Mistake(line, f"{name}.{option}: {error}"))
    missing = [field.name for field in fields.values() if field.required and field.name not in table]
    mistakes.extend(Mistake(lines.get(place, 0), f"[{name}] lacks the option {option!r}") for option in missing)
    return good


def _check_together(
    values: dict[str, Any], document: dict[str, Any], lines: dict[tuple[str, ...], int]
) -> Iterator[Mistake]:
    """Mistakes that only appear when several options are read together."""
    roles = values.get("node", {}).get("roles", [])
    disks = values.get("disks", [])
    node_line = lines.get(("node", "roles"), lines.get(("node",), 0))
    if "storage" in roles and not document.get("disks"):
        yield Mistake(node_line, "the role storage wants at least one [[disks]] table")
    if roles and "storage" not in roles and disks:
        yield Mistake(lines.get(("disks",), 0), "[[disks]] are of use only to the role storage")
    if "storage" in roles and not document.get("rpc", {}).get("listen"):
        yield Mistake(lines.get(("rpc",), node_line), "the role storage wants rpc.listen, the address other nodes call")
    for section, field in (("disks", "id"), ("disks", "directory"), ("notifications", "name")):
        seen: dict[str, int] = {}
        for index, table in enumerate(values.get(section, [])):
            value = table.get(field)
            if value in seen and value is not None:
                yield Mistake(
                    lines.get((section, str(index), field), 0),
                    f"{section}.{field}: {value!r} is also that of {_LISTS[section]} {seen[value] + 1}",
                )
            seen.setdefault(value, index)
    if roles and "gateway" not in roles and values.get("notifications"):
        yield Mistake(lines.get(("notifications",), 0), "[[notifications]] are of use only to the role gateway")
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
    if s3.get("website_domain") in {domain.lower().strip(".") for domain in s3.get("domains", [])}:
        yield Mistake(
            lines.get(("s3", "website_domain"), 0),
            "s3.website_domain: is also one of s3.domains; a host is of the S3 API or of a website",
        )
    if "storage" in roles and s3.get("workers", 1) > 1:
        yield Mistake(
            lines.get(("s3", "workers"), 0),
            "s3.workers: a node with disks is one process; give the gateway a node of its own to have several",
        )


def _absolute(text: str, base: Path) -> str:
    if text.startswith("$CREDENTIALS_DIRECTORY"):
        place = os.environ.get("CREDENTIALS_DIRECTORY") or NO_CREDENTIALS
        text = place + text.removeprefix("$CREDENTIALS_DIRECTORY")
    return os.path.normpath(base / Path(text).expanduser())
