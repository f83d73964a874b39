"""Targets, and the parts that all oracles share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from storaged.errors import S3Error
from storaged.s3.xml import error_document

T = TypeVar("T")

Oracle = Callable[[bytes], None]


class Plant:
    """A bug: ``owner.name`` is replaced by ``bug(original)`` while it is planted."""

    def __init__(self, owner: Any, name: str, bug: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._bug = bug

    @contextmanager
    def planted(self) -> Iterator[None]:
        before = getattr(self._owner, self._name)
        setattr(self._owner, self._name, self._bug(before))
        try:
            yield
        finally:
            setattr(self._owner, self._name, before)


@dataclass(frozen=True)
class Target:
    """``run``: the oracle. ``tokens``: words of the language, for the mutator. ``seeds``: inputs to begin with.
    ``plant``: a bug that the oracle notices on the corpus, or on inputs that are made from it.

    ``steps``, ``steps_a_byte``: the most lines of the product that an input may run; ``peak_bytes``,
    ``peak_a_byte``: the most memory that it may hold at once.
    """

    name: str
    run: Oracle
    seeds: Sequence[bytes]
    plant: Plant
    tokens: Sequence[bytes] = ()
    size_max: int = 4096
    steps: int = 2_000
    steps_a_byte: int = 40
    peak_bytes: int = 512 * 1024
    peak_a_byte: int = 400


def refused(work: Callable[[], T]) -> T | S3Error:
    """The result, or the error of S3 that the client gets: for its own mistake (4xx), or for a missing feature (501).
    Any other exception would be a 500, and is a finding."""
    try:
        return work()
    except S3Error as error:
        failed = error
    assert 300 <= failed.status < 500 or failed.status == 501, f"{failed.code} is an error of the server"
    error_document(failed.code, failed.message, failed.details, "/", "1", "1")
    return failed


def cut(data: bytes, step: int) -> Iterator[bytes]:
    return (data[start : start + step] for start in range(0, len(data), step))
