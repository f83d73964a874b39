"""Codes under which one node, or an admin port, refuses another's call. They are in logs and audit logs, and as
``remote_code`` in PeerRefused; ``storaged explain`` has them. Never raised.
"""

from __future__ import annotations

from typing import ClassVar

from storaged.errors.base import StoragedError


class Refusal(StoragedError):
    """A call was refused."""

    code: ClassVar[str] = "REFUSAL"


class UnknownMethod(Refusal):
    """The node has no such method: it is of another role, or runs another version of the program."""

    code = "UNKNOWN_METHOD"
    hint = "While a new version is installed on one node after the other, this is normal. Afterwards it must end."


class RoleRefused(Refusal):
    """The caller's certificate has a role that may not call this method.

    Storage nodes of version 0.1.0 are refused in this way while a cluster is upgraded. At any other time a program or a
    person uses the certificate for what no storage node does.
    """

    code = "ROLE_REFUSED"
    hint = (
        "During an upgrade go on with it. Otherwise look at the machine that the log names: its certificate may have"
        " leaked (`storaged cluster revoke`). `storaged cluster methods` prints what each role may call."
    )


class NotAMember(Refusal):
    """The caller has a certificate of the cluster, and the layout in force does not name it at its place."""

    code = "NOT_A_MEMBER"
    hint = (
        "Apply the layout that names it (`storaged cluster apply` on a gateway). If the node was removed, stop it. If"
        " its rack changed, issue its certificate anew."
    )


class BallotRefused(Refusal):
    """The call used a ballot of another gateway: each gateway may speak under its own ballots only."""

    code = "BALLOT_REFUSED"
    hint = "No gateway of this program does this: look at the machine that the log names (`storaged cluster revoke`)."


class MoveRefused(Refusal):
    """A storage node asked a gateway to note places of fragments that are false, or that the layout does not allow.

    The record of the object stays as it was.
    """

    code = "MOVE_REFUSED"
    hint = (
        "Once, after the layout changed, this can happen to a node that did not know it yet. If it goes on, look at the"
        " machine that the log names."
    )


class BadMessage(Refusal):
    """The call, or a field of it, can't be read."""

    code = "BAD_MESSAGE"
    hint = "Install one version on all nodes. If they have the same one, the caller is faulty or hostile."


class BadReply(Refusal):
    """The answer of the other node can't be read, or is not what was asked for."""

    code = "BAD_REPLY"
    hint = "Install one version on all nodes. If they have the same one, the node that answered is faulty or hostile."


class TooManyConnections(Refusal):
    """The caller has as many connections to this node as one node may have."""

    code = "TOO_MANY_CONNECTIONS"
    hint = "Look whether two processes run with one certificate, on the machine that the log names."


class Internal(Refusal):
    """The node failed to carry out the call. Its log has the reason."""

    code = "INTERNAL"
    hint = "Read the log of the node that is named: `journalctl -u storaged@NODE`."


class NotFound(Refusal):
    """The node that answers has no such call: this command and the node are of different versions, or the command line
    names an empty bucket or user.
    """

    code = "NOT_FOUND"
    hint = "Use the program of the version that the node runs, and write names out in full."


class NotAllowed(Refusal):
    """A user who is neither root nor the node's own has connected to its admin socket. The audit log has who."""

    code = "NOT_ALLOWED"
    hint = "Use the user of the node (`storaged`, `storaged-gateway`), or root."
