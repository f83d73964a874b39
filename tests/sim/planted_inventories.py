"""Bugs in inventories. The play ``inventories`` notices them.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_WORKER = "storaged/s3/inventories.py"
_ROWS = "storaged/objects/inventory/rows.py"
_LISTING = "storaged/objects/inventory/listing.py"
_MANIFEST = "storaged/s3/inventory/manifest.py"
_PLAY = "inventories"

INVENTORY_BUGS = (
    Planted(
        "row_before_its_file",
        "the row of a data file is written although the file was not put",
        20,
        _PLAY,
        _WORKER,
        "            await self._put(bucket, report, key, data, DATA_TYPE)\n",
        "            try:\n                await self._put(bucket, report, key, data, DATA_TYPE)\n"
        "            except StoragedError:\n                pass\n",
    ),
    Planted(
        "both_files_count",
        "of two workers that make the same file, each goes on from its own",
        65,
        _PLAY,
        _ROWS,
        "        return Change(body) if _file_in(value) is None else None\n\n    key = _FILE",
        "        return Change(body)\n\n    key = _FILE",
    ),
    Planted(
        "manifest_of_what_is_made",
        "a worker that finds files of another one puts the manifest of these",
        40,
        _PLAY,
        _WORKER,
        "        if made is None or last is None or not last.last:\n",
        "        if made is None or last is None:\n",
    ),
    Planted(
        "file_begins_at_the_key",
        "a file begins after the key that the last one ended in, without the rest of its versions",
        60,
        _PLAY,
        _LISTING,
        "                return Position(key, entry.ordinal) if entry.ordinal else Position(key)\n",
        "                return Position(key)\n",
    ),
    Planted(
        "begins_with_the_key_again",
        "a file begins with all versions of the key that the last one ended in",
        60,
        _PLAY,
        _LISTING,
        "(await plane.registers.read(name)).value, at.below)\n",
        "(await plane.registers.read(name)).value, None)\n",
    ),
    Planted(
        "finished_before_the_manifest",
        "a report counts as finished before its manifests are put",
        10,
        _PLAY,
        _WORKER,
        "        for document in documents(report, bucket.name, state.began_ms, made):\n"
        "            await self._put(bucket, report, *document)\n",
        "",
    ),
    Planted(
        "checksum_first",
        "the checksum of a manifest comes before it",
        10,
        _PLAY,
        _WORKER,
        "        for document in documents(report, bucket.name, state.began_ms, made):\n",
        "        for document in reversed(list(documents(report, bucket.name, state.began_ms, made))):\n",
    ),
    Planted(
        "begun_by_each",
        "a worker begins a report although another one has begun",
        40,
        _PLAY,
        _ROWS,
        "        return Change(body) if _state_in(value) == before else None\n\n"
        "    found = _state_in((await plane.registers.change(_name(bucket, _STATE + digest), update)).after)\n"
        "    if found == new:",
        "        return Change(body)\n\n"
        "    found = _state_in((await plane.registers.change(_name(bucket, _STATE + digest), update)).after)\n"
        "    if found == new:",
    ),
    Planted(
        "day_of_the_end",
        "a report is due a day after the last one ended",
        20,
        _PLAY,
        _WORKER,
        "            is_due(report, state.began_ms, now_ms, self._day_ms) if state.finished_ms else"
        " state.configuration != wanted\n",
        "            is_due(report, state.finished_ms + self._day_ms, now_ms, self._day_ms)"
        " if state.finished_ms else state.configuration != wanted\n",
    ),
    Planted(
        "each_version_is_current",
        "a list of current objects has older versions too",
        20,
        _PLAY,
        _LISTING,
        "        if not all_versions:\n            await page.add_newest(row.key, row.value)\n",
        "        if not all_versions and not row.value.body:\n            await page.add_newest(row.key, row.value)\n",
    ),
)
