"""The log of a gateway's copies of bucket keys: durable, bounded, and whatever its end looks like the rest is read."""

from __future__ import annotations

import asyncio
import errno
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import KeyringMismatch, KeyringUnavailable
from storaged.keys import CopyLog, copies, write_restored
from storaged.keys.bucketkey import KeyCopy, WrappedBucketKey
from storaged.keys.copies import ENTRY_HEAD_BYTES, HEADER_BYTES, SLACK_BYTES, read_log, render_entry, render_log
from storaged.wire import encode

KEYRING = b"k" * 16


def copy_of(number: int, version: int = 1) -> tuple[bytes, bytes]:
    bucket_id = number.to_bytes(16, "big")
    return bucket_id, encode(
        KeyCopy(bucket_id, (WrappedBucketKey(version, 1, 1000 * number, bytes([number % 256]) * 112),))
    )


async def opened(directory) -> CopyLog:
    log = CopyLog(directory, KEYRING)
    await log.open()
    return log


async def test_what_was_kept_is_there_after_a_restart_and_only_its_owner_may_read_it(tmp_path):
    log = await opened(tmp_path)
    for number in range(50):
        await log.keep(*copy_of(number))
    await log.keep(*copy_of(7, version=2))
    log.close()
    again = await opened(tmp_path)
    assert await again.every() == dict(copy_of(number, 2 if number == 7 else 1) for number in range(50))
    assert await again.get(copy_of(7)[0]) == copy_of(7, 2)[1]
    assert await again.get(b"?" * 16) is None
    assert stat.S_IMODE(again.path.stat().st_mode) == 0o600
    assert (again.count, again.cut_bytes, again.newer_than(40_000)) == (50, 0, 9)
    again.close()


async def test_a_copy_costs_its_own_bytes_however_many_there_are(tmp_path):
    log = await opened(tmp_path)
    sizes = []
    for number in range(300):
        await log.keep(*copy_of(number))
        sizes.append(log.path.stat().st_size)
    assert sizes == [
        HEADER_BYTES + sum(ENTRY_HEAD_BYTES + len(copy_of(n)[1]) for n in range(number + 1)) for number in range(300)
    ]
    await log.keep(*copy_of(3))
    assert log.path.stat().st_size == sizes[-1]
    log.close()


async def test_the_log_is_bounded_by_what_it_holds_however_often_a_key_changes(tmp_path):
    log = await opened(tmp_path)
    live = HEADER_BYTES + ENTRY_HEAD_BYTES + len(copy_of(1)[1])
    for version in range(1, 2000):
        await log.keep(*copy_of(1, version))
        assert log.path.stat().st_size <= 2 * live + SLACK_BYTES + 64
    log.close()
    assert await (await opened(tmp_path)).every() == dict([copy_of(1, 1999)])


async def test_of_a_forgotten_key_nothing_stays_in_the_file(tmp_path):
    log = await opened(tmp_path)
    for number in range(1, 5):
        await log.keep(*copy_of(number))
    await log.forget([copy_of(2)[0], copy_of(3)[0], b"?" * 16])
    content = log.path.read_bytes()
    assert [copy_of(number)[1] in content for number in range(1, 5)] == [True, False, False, True]
    await log.keep(*copy_of(9))
    log.close()
    assert sorted(await (await opened(tmp_path)).every()) == [copy_of(number)[0] for number in (1, 4, 9)]


@given(st.integers(0, 3), st.data())
def test_whatever_the_end_of_the_log_looks_like_the_entries_before_it_are_read(whole, data):
    entries = [copy_of(number) for number in range(4)]
    content = render_log(KEYRING, [copy for _, copy in entries])
    lengths = [HEADER_BYTES + sum(len(render_entry(copy)) for _, copy in entries[:count]) for count in range(5)]
    cut = data.draw(st.integers(lengths[whole], lengths[whole + 1] - 1))
    assert read_log(content[:cut], KEYRING) == (dict(entries[:whole]), lengths[whole])
    broken = bytearray(content)
    broken[data.draw(st.integers(lengths[whole], lengths[whole + 1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert read_log(bytes(broken), KEYRING) == (dict(entries[:whole]), lengths[whole])


async def test_a_torn_end_is_cut_off_and_what_follows_is_kept(tmp_path):
    log = await opened(tmp_path)
    for number in range(3):
        await log.keep(*copy_of(number))
    log.close()
    with log.path.open("ab") as file:
        file.write(render_entry(copy_of(9)[1])[:-5])
    again = await opened(tmp_path)
    assert again.cut_bytes == len(render_entry(copy_of(9)[1])) - 5
    await again.keep(*copy_of(4))
    again.close()
    assert sorted(await (await opened(tmp_path)).every()) == [copy_of(number)[0] for number in (0, 1, 2, 4)]


async def test_a_log_that_is_none_is_set_aside_and_begun_anew(tmp_path):
    (tmp_path / "bucketkeys").write_bytes(b"what is this")
    log = await opened(tmp_path)
    await log.keep(*copy_of(1))
    assert (tmp_path / "bucketkeys.damaged").read_bytes() == b"what is this"
    assert log.cut_bytes == 12
    log.close()


async def test_the_log_of_another_keyring_is_refused_and_left_as_it_is(tmp_path):
    content = render_log(b"x" * 16, [copy_of(1)[1]])
    (tmp_path / "bucketkeys").write_bytes(content)
    with pytest.raises(KeyringMismatch, match="78787878"):
        await opened(tmp_path)
    assert (tmp_path / "bucketkeys").read_bytes() == content


async def test_a_full_disk_is_told_to_who_keeps_a_key_and_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log = await opened(tmp_path)
    await log.keep(*copy_of(1))
    before = log.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", full)
        with pytest.raises(KeyringUnavailable, match="No space left"):
            await log.keep(*copy_of(2))
    assert log.path.read_bytes() == before
    assert "No space left" in log.problem
    assert await log.get(copy_of(2)[0]) is None
    await log.keep(*copy_of(2))
    assert log.problem == ""
    log.close()
    assert len(await (await opened(tmp_path)).every()) == 2


async def test_a_log_that_cannot_be_begun_is_begun_when_it_can(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(copies, "replace_file", full)
        log = await opened(tmp_path)
        assert "No space left" in log.problem
        with pytest.raises(KeyringUnavailable):
            await log.keep(*copy_of(1))
    await log.keep(*copy_of(1))
    assert log.problem == ""
    log.close()
    assert (await opened(tmp_path)).count == 1
    with pytest.raises(KeyringUnavailable, match="is closed"):
        await log.keep(*copy_of(2))


async def test_many_at_once_are_all_kept(tmp_path):
    log = await opened(tmp_path)
    await asyncio.gather(*(log.keep(*copy_of(number)) for number in range(64)))
    log.close()
    assert (await opened(tmp_path)).count == 64


async def test_copies_of_a_backup_lie_beside_the_log_until_they_are_taken(tmp_path):
    log = await opened(tmp_path)
    assert await log.restored() == {}
    write_restored(tmp_path, KEYRING, [copy_of(1)[1], copy_of(2)[1]])
    assert await log.restored() == dict([copy_of(1), copy_of(2)])
    await log.remove_restored()
    assert await log.restored() == {}
    write_restored(tmp_path, KEYRING, [copy_of(1)[1]])
    path = tmp_path / "bucketkeys.restored"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KeyringMismatch, match="is damaged"):
        await log.restored()
    log.close()
