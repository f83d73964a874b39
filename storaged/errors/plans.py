"""What ``storaged cluster plan`` says about a change that can't work, or that its operator has to know."""

from __future__ import annotations

from storaged.errors.base import Condition, OperatorError


class PlanTooLittleSpace(OperatorError):
    """Disks would get more data than they have room for. The plan is refused: the data could not move to its end."""

    code = "PLAN_TOO_LITTLE_SPACE"
    hint = (
        "Add disks in the same change, drain fewer at once, or delete data first. `storaged cluster plan` names the"
        " disks; the sizes are estimates."
    )


class DiskNotDrained(Condition):
    """A disk that the change removes still answers, and was not drained. Until what it has is built again on other
    disks, the cluster survives one failure less.
    """

    code = "DISK_NOT_DRAINED"
    hint = (
        "Drain it first (`storaged disk drain`), apply that layout, and remove the disk when `storaged status`"
        " shows nothing that moves. Remove it at once only if it can't be read."
    )


class MoveUnfinished(Condition):
    """An earlier change still moves data, or was signed and is not in force yet. A change that is planned now counts
    from where the earlier one ends, so the cluster may survive less meanwhile than `plan` says.
    """

    code = "MOVE_UNFINISHED"
    hint = "Wait until `storaged status` shows nothing that moves; apply what was signed before."


class LayoutWeak(Condition):
    """The layout works, and can't survive that one rack, one server or, with a profile that is spread over operators,
    one operator is away: it has too few of them, or too many seed disks in one place. `storaged status` repeats this
    while the layout is in force.
    """

    code = "LAYOUT_WEAK"
    hint = (
        "Add servers in other racks, so that there are three racks or more, each with disks of its own; or in racks of"
        " another operator, where the text names operators."
    )


class RecoverRefused(OperatorError):
    """A recovery from the loss of disks is refused: it is not needed, it can't be done, the disks still answer, or the
    words were not those that it asks for.
    """

    code = "RECOVER_REFUSED"
    status = 409
    hint = (
        "Recovery gives up what only the lost disks had. Where a majority is left, remove the disks by the ordinary"
        " commands instead (`storaged disk remove`, `storaged node remove`): nothing is lost then. A disk that can"
        " still be read in full is better copied (deploy/README.md, «A disk died»)."
    )
