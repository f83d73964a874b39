"""What every ``Files`` and its segments do. A body's test module subclasses the suite and gives a ``files`` fixture."""

from __future__ import annotations

import pytest

from storaged.fragments.files import Files


class FilesSuite:
    def test_segments_are_listed_by_their_numbers(self, files: Files) -> None:
        assert files.segments() == []
        for number in (12, 3, 7):
            files.create(number)
        assert files.segments() == [3, 7, 12]
        files.sync_directory()
        files.remove(7)
        assert files.segments() == [3, 12]

    def test_what_was_written_is_read_back_wherever_it_was_written(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"head", bytearray(b"er"), memoryview(b"...")], 0)
        segment.write([b"tail"], 20)
        segment.write([b"XX"], 1)
        assert segment.size() == 24
        assert segment.read(0, 9) == b"hXXder..."
        assert segment.read(9, 15) == bytes(11) + b"tail"
        assert files.open(1).read(20, 4) == b"tail"

    def test_a_read_ends_with_the_file(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"0123456789"], 0)
        assert segment.read(6, 100) == b"6789"
        assert segment.read(10, 100) == segment.read(500, 1) == b""

    def test_a_read_without_a_wait_is_the_same_or_none(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"0123456789"], 0)
        found = segment.try_read(2, 3)
        assert found is None or bytes(found) == b"234"

    def test_a_segment_that_was_cut_is_as_short_and_can_grow_again(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"0123456789"], 0)
        segment.sync()
        segment.truncate(4)
        assert (segment.size(), segment.read(0, 100)) == (4, b"0123")
        segment.write([b"ab"], 6)
        assert segment.read(0, 100) == b"0123\0\0ab"
        segment.sync_apart()

    def test_a_hole_reads_as_zeros_and_what_is_beside_it_stays(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"a" * 4096, b"b" * 4096, b"c" * 4096], 0)
        segment.sync()
        if segment.punch(4096, 4096):
            assert segment.read(0, 3 * 4096) == b"a" * 4096 + bytes(4096) + b"c" * 4096
        assert segment.size() == 3 * 4096

    def test_hints_change_nothing(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"0123456789"], 0)
        segment.start_writeback(0, 10)
        segment.drop_cache(0)
        assert segment.read(0, 10) == b"0123456789"

    def test_a_segment_that_was_removed_can_not_be_read(self, files: Files) -> None:
        segment = files.create(1)
        segment.write([b"0123456789"], 0)
        segment.sync()
        files.remove(1)
        with pytest.raises(FileNotFoundError):
            files.open(1).read(0, 1)

    def test_a_reserve_is_kept_until_it_is_given_back(self, files: Files) -> None:
        assert not files.reserve(0)
        assert files.reserve(64 * 1024)
        assert files.reserve(0)
        assert not files.reserve(0)

    def test_there_is_space(self, files: Files) -> None:
        space = files.space()
        assert 0 < space.free <= space.total

    def test_a_failure_is_noted_once_it_happened(self, files: Files) -> None:
        assert files.failure() == ""
        assert files.mark_failed("the drive is gone")
        assert files.failure() == "the drive is gone"
