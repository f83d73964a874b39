"""Errors between nodes. They are turned into errors of another family before a user sees them."""

from __future__ import annotations

from storaged.errors.base import PeerError


class PeerUnreachable(PeerError):
    """The peer is not connected, or the connection broke before it answered. The call may or may not have been carried
    out.
    """

    code = "PEER_UNREACHABLE"


class PeerTimeout(PeerUnreachable):
    """The peer did not answer within the deadline. The call may or may not have been carried out."""

    code = "PEER_TIMEOUT"


class PeerRefused(PeerError):
    """The peer answered with an error of its own; ``code`` of the remote error is in ``remote_code``."""

    code = "PEER_REFUSED"

    def __init__(self, message: str = "", remote_code: str = "", **details: str) -> None:
        super().__init__(message, **details)
        self.remote_code = remote_code


class FragmentMissing(PeerError):
    """The disk does not hold this fragment."""

    code = "FRAGMENT_MISSING"


class FragmentOther(PeerError):
    """The disk holds another fragment with this id, which is undamaged. Only a gateway may replace it."""

    code = "FRAGMENT_OTHER"


class FragmentDamaged(PeerError):
    """The fragment's bytes do not match their checksum on the disk, or the drive can't read them now (``unread``)."""

    code = "FRAGMENT_DAMAGED"

    @property
    def unread(self) -> bool:
        """The drive reported an error, which says nothing of the bytes: a later read may bring them."""
        return self.details.get("unread") == "yes"


class DiskUnusable(PeerError):
    """The disk cannot take this now (full, read-only, failed, unknown to the node)."""

    code = "DISK_UNUSABLE"
