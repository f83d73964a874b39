"""Carries errors between nodes: a handler's exception becomes an ``ErrorHead``, and an exception again at the caller.

A PeerError crosses as its own class, any other StoragedError as PeerRefused with its code. Anything unexpected crosses
as PeerRefused with ``INTERNAL``; its traceback stays in the log of the node where it happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from storaged.cluster.rpc.framing import ErrorHead
from storaged.errors import (
    BadMessage,
    BadReply,
    BallotRefused,
    CertificateRefused,
    CertificateRevoked,
    Internal,
    JurisdictionRefused,
    MoveRefused,
    NotAMember,
    PeerError,
    PeerRefused,
    RoleRefused,
    StoragedError,
    TooManyConnections,
    UnknownMethod,
)

INTERNAL = Internal.code
UNKNOWN_METHOD = UnknownMethod.code
BAD_MESSAGE = BadMessage.code
ROLE_REFUSED = RoleRefused.code
NOT_A_MEMBER = NotAMember.code
BALLOT_REFUSED = BallotRefused.code
MOVE_REFUSED = MoveRefused.code
BAD_REPLY = BadReply.code
TOO_MANY_CONNECTIONS = TooManyConnections.code

MESSAGE_CHARS_MAX = 4096
CODE_CHARS_MAX = 64
DETAILS_MAX = 16


def plain(text: str, chars_max: int = MESSAGE_CHARS_MAX) -> str:
    """Makes another node's text safe for logs and terminals: cuts it, and replaces control characters."""
    text = text[:chars_max]
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def to_head(error: BaseException) -> ErrorHead:
    """The error as it is sent to a peer."""
    if isinstance(error, StoragedError):
        remote_code = error.remote_code if isinstance(error, PeerRefused) else ""
        details = {str(name): str(value)[:MESSAGE_CHARS_MAX] for name, value in error.details.items()}
        return ErrorHead(error.code, error.message[:MESSAGE_CHARS_MAX], details, remote_code)
    return ErrorHead(INTERNAL, "The node failed to carry this out; its log says why.", {})


def from_head(head: ErrorHead, node: str) -> PeerError:
    """The exception for an error that ``node`` replied with. Its texts are not trusted: they are cut and made plain."""
    kind = _peer_errors().get(head.code)
    message = plain(head.message)
    if kind is None:
        error: PeerError = PeerRefused(
            f"{node}: {message}"[:MESSAGE_CHARS_MAX], remote_code=plain(head.code, CODE_CHARS_MAX)
        )
    elif issubclass(kind, PeerRefused):
        error = kind(message, remote_code=plain(head.remote_code, CODE_CHARS_MAX))
    else:
        error = kind(message)
    error.details = {
        plain(name, CODE_CHARS_MAX): plain(value) for name, value in islice(head.details.items(), DETAILS_MAX)
    }
    return error


def refused(code: str, message: str) -> PeerRefused:
    """The error of a server that refuses a call under one of the codes above."""
    return PeerRefused(message, remote_code=code)


def handshake_refused(head: ErrorHead, node: str) -> StoragedError:
    """The error of a node that ``node`` refuses in the handshake, under the code of the refusal: of the same class
    where it is about certificates, otherwise PeerRefused. A code that no refusal of this program has is not passed on:
    the audit log counts by code. ``refused_with`` of the details says that it is no refusal by this node.
    """
    message = f"{node} refuses this node: {plain(head.message)}"
    for kind in (CertificateRefused, CertificateRevoked, JurisdictionRefused):
        if head.code == kind.code:
            return kind(message, refused_with=head.code)
    code = head.remote_code if head.remote_code == TOO_MANY_CONNECTIONS else ""
    return PeerRefused(message, remote_code=code, refused_with=code)


def as_peer_error(error: Exception, node: str) -> PeerError:
    """The error that a caller on this node gets: the same that a caller on another node would get."""
    return error if isinstance(error, PeerError) else from_head(to_head(error), node)


_peer_error_by_code: dict[str, type[PeerError]] = {}


def _peer_errors() -> dict[str, type[PeerError]]:
    """Every subclass of PeerError by its code, built again when classes were added."""
    classes = list(_descend(PeerError))
    if len(classes) != len(_peer_error_by_code):
        _peer_error_by_code.clear()
        _peer_error_by_code.update({kind.code: kind for kind in reversed(classes)})
    return _peer_error_by_code


def _descend(kind: type[PeerError]) -> Iterator[type[PeerError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _descend(child)
