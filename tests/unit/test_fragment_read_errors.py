"""A read that fails says nothing of the bytes: only what a drive can't read of its medium counts as damaged."""

from __future__ import annotations

import errno

from storaged.lmdb_file import MEDIA_ERRORS


def test_a_lack_of_descriptors_memory_or_time_is_no_damage() -> None:
    assert MEDIA_ERRORS.isdisjoint(
        (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT)
    )
    assert errno.EIO in MEDIA_ERRORS
