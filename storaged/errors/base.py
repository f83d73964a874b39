"""The root of all errors that reach a user, and the four families below it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class StoragedError(Exception):
    """Something went wrong.

    ``message`` defaults to the first paragraph of the class's docstring. ``details`` are extra named facts; they become
    elements of the S3 error body, such as ``<Region>``.
    """

    code: ClassVar[str] = "ERROR"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    hint: ClassVar[str] = ""
    default_message: ClassVar[str] = "Something went wrong."

    def __init_subclass__(cls) -> None:
        if "code" not in cls.__dict__:
            cls.code = cls.__name__
        first_paragraph = (cls.__doc__ or cls.code).strip().split("\n\n")[0]
        cls.default_message = " ".join(first_paragraph.split())

    def __init__(self, message: str = "", **details: str) -> None:
        self.message = message or self.default_message
        self.details = details
        super().__init__(self.message)


class S3Error(StoragedError):
    """An S3 request was refused."""

    status = 400


class OperatorError(StoragedError):
    """A command or a daemon could not do what was asked."""

    code = "OPERATOR_ERROR"


class Condition(StoragedError):
    """A state of the cluster, listed by ``storaged status``; never raised."""

    code = "CONDITION"


class PeerError(StoragedError):
    """A peer did not do what was asked of it."""

    code = "PEER_ERROR"


def every_error(root: type[StoragedError] = StoragedError) -> Iterator[type[StoragedError]]:
    """All concrete classes below ``root``, depth first: what ``storaged explain`` knows."""
    for child in root.__subclasses__():
        if child.__subclasses__() or child.__dict__.get("code") not in (
            None,
            "OPERATOR_ERROR",
            "CONDITION",
            "PEER_ERROR",
        ):
            yield child
        yield from every_error(child)
