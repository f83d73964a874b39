"""What an inventory may say, judged from what clients did: written independently of the program.

``Clients`` notes each change of an object, from when to when it was under way. ``check_rows`` judges the rows of a
report by that: each object that was there unchanged from before the report began until its manifest was put is listed
once, nothing is listed twice, nothing that was gone before, and nothing that never was.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

NEVER = float("inf")


@dataclass
class Wrote:
    """A change of a key. ``etag``: of the object that it makes; empty: it makes a delete marker, or (``removes``) takes
    away the version with that ETag or id. ``returned``: NEVER when it is not known whether it was carried out.
    """

    key: str
    invoked: float
    etag: str = ""
    version: str = ""
    removes: str = ""
    size: int = 0
    returned: float = NEVER


@dataclass
class Clients:
    """The changes of one bucket. ``versioned``: it has versioning."""

    versioned: bool
    wrote: list[Wrote] = field(default_factory=list)

    def of(self, key: str) -> list[Wrote]:
        return [one for one in self.wrote if one.key == key]


class Report(NamedTuple):
    """``began_s``: before it began; ``ended_s``: when its manifest was put. ``everything``: all versions."""

    began_s: float
    ended_s: float
    prefix: str
    everything: bool


def rows_of(manifest: dict[str, Any], stored: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """Of its data files. Raises ValueError where it does not agree with what is stored."""
    columns = manifest["fileSchema"].split(", ")
    for file in manifest["files"]:
        data = stored.get(file["key"])
        if data is None:
            raise ValueError(f"a manifest names {file['key']}, which is not stored")
        if (len(data), hashlib.md5(data).hexdigest()) != (file["size"], file["MD5checksum"]):
            raise ValueError(f"a manifest names another {file['key']} than there is")
        for cells in csv.reader(io.StringIO(gzip.decompress(data).decode())):
            yield dict(zip(columns, cells, strict=True))


def check_rows(report: Report, clients: Clients, rows: list[dict[str, str]]) -> Iterator[str]:
    """What is wrong."""
    listed = Counter((unquote(row["Key"]), row["ETag"] or row.get("VersionId", "")) for row in rows)
    for (key, what), count in listed.items():
        if count > 1:
            yield f"{key} {what} is listed {count} times"
    for row in rows:
        yield from _check_row(report, clients.of(unquote(row["Key"])), row, clients.versioned)
    for one in clients.wrote:
        kept = _is_there(report, clients.of(one.key), one, clients.versioned)
        if kept and one.key.startswith(report.prefix) and not listed[one.key, one.etag or one.version]:
            yield f"{one} was there all the time, and is not listed"


def _check_row(report: Report, own: list[Wrote], row: dict[str, str], versioned: bool) -> Iterator[str]:
    etag, version = row["ETag"], row.get("VersionId", "")
    made = [one for one in own if not one.removes and (one.etag == etag if etag else not one.etag)]
    if not etag:
        made = [one for one in made if one.version in ("", version)]
    if not made or all(one.invoked > report.ended_s for one in made):
        yield f"no client made what {row} names"
        return
    if etag and row["Size"] != str(made[0].size):
        yield f"{row} has another size than {made[0]}"
    if not unquote(row["Key"]).startswith(report.prefix):
        yield f"{row} does not begin with the prefix"
    if len(made) == 1 and _was_gone(report, own, made[0], versioned):
        yield f"{row} was gone before the report began: {made[0]}"


def _is_there(report: Report, own: list[Wrote], one: Wrote, versioned: bool) -> bool:
    """Whether this was there, as a report lists it, all the time."""
    if one.removes or one.returned > report.began_s or not (one.etag or (versioned and report.everything)):
        return False
    if versioned and report.everything:
        return not any(other.removes in _names(one) and other.invoked < report.ended_s for other in own)
    return all(other is one or other.returned < one.invoked or other.invoked > report.ended_s for other in own)


def _was_gone(report: Report, own: list[Wrote], one: Wrote, versioned: bool) -> bool:
    """Whether it was surely not there any more when the report began."""
    after = [other for other in own if other.invoked > one.returned and other.returned < report.began_s]
    if versioned and report.everything:
        return any(other.removes in _names(one) for other in after)
    if versioned and any(other.removes for other in own):
        return False  # what is removed uncovers an older version
    return bool(after)


def _names(one: Wrote) -> set[str]:
    return {name for name in (one.etag, one.version) if name}
