"""Errors that the command line and the log show to the operator. The code is in capitals."""

from __future__ import annotations

from storaged.errors.base import OperatorError


class ConfigInvalid(OperatorError):
    """The configuration has mistakes; each is listed with its place."""

    code = "CONFIG_INVALID"
    hint = (
        "Correct the lines named and run `storaged config check FILE` again. A running daemon keeps its old"
        " configuration."
    )


class DirectoryInUse(OperatorError):
    """Another process is already running on this directory."""

    code = "DIRECTORY_IN_USE"
    hint = "Stop it first (`storaged dev stop`, or systemctl stop), or give this one another directory."


class FolderInUse(OperatorError):
    """Another command works on the folder with the authority's keys."""

    code = "FOLDER_IN_USE"
    hint = "Wait until it has ended (`cluster recover` waits for its words), and repeat yours. Nothing was changed."


class PortInUse(OperatorError):
    """The address is already in use by another program."""

    code = "PORT_IN_USE"
    hint = (
        "Choose another port, or stop the program that has it. A trial cluster gets others by `storaged dev --s3-port N"
        " --admin-port N`, a server in `listen` of [s3], [rpc] and [admin] in its config.toml."
    )


class NotRunning(OperatorError):
    """The cluster does not answer."""

    code = "NOT_RUNNING"
    exit_code = 2
    hint = (
        "On a server, name the node's directory: `storaged --dir /var/lib/storaged/NODE ...`, and start the node if it"
        " does not run. A trial cluster: `storaged dev DIR` starts it; --dir or STORAGED_DIR names another one."
    )


class NotATrialCluster(OperatorError):
    """This command works on trial clusters (`storaged dev`), and the directory has none."""

    code = "NOT_A_TRIAL_CLUSTER"
    exit_code = 2
    hint = (
        "On a server: `storaged user add NAME` prints a user's keys, and [s3] of the gateway's config.toml has the"
        " address."
    )


class SeveralClusters(OperatorError):
    """Several trial clusters run on this machine, and the command names none of them."""

    code = "SEVERAL_CLUSTERS"
    exit_code = 2
    hint = "Name one of them: `storaged --dir DIR ...`, or set STORAGED_DIR (`storaged --dir DIR env` prints it)."


class AmbiguousName(OperatorError):
    """The name matches no node or rack, or more than one."""

    code = "AMBIGUOUS_NAME"
    exit_code = 2


class KeyringMismatch(OperatorError):
    """The keyring is missing, or is not the one this cluster was created with."""

    code = "KEYRING_MISMATCH"
    hint = (
        "Restore it: `storaged keys restore FILE --config CONFIG.toml`. Only the first gateway of a new cluster makes"
        " one, once: `storaged keys create CONFIG.toml`. With new keys nothing of an existing cluster could be read."
    )


class KeyringDamaged(OperatorError):
    """The keyring file is damaged, or is not a keyring."""

    code = "KEYRING_DAMAGED"
    hint = "Move it aside, and restore the backup in its place: `storaged keys restore FILE`."


class FileExists(OperatorError):
    """The file exists already; it was left as it is."""

    code = "FILE_EXISTS"
    hint = "Name another file, or move this one aside. Files with keys are never overwritten."


class WrongPassphrase(OperatorError):
    """The passphrase does not open this keyring."""

    code = "WRONG_PASSPHRASE"


class DiskForeign(OperatorError):
    """The disk has another metadata store than the cluster knows for it: a disk of another place or cluster, or one
    whose store failed for good. What it promised is unknown, so it answers nothing.
    """

    code = "DISK_FOREIGN"
    hint = (
        "Put the disk, or the mount, that was there back in its place, and restart its node; exchange two disks that"
        " were swapped. Do not copy files between disks. If the disk is gone, or its store failed: replace it, as"
        " `storaged explain DISK_BLANK` describes."
    )


class DiskRolledBack(DiskForeign):
    """The disk's metadata store is an older state of itself: the disk, or its whole machine, was put back from a
    snapshot or a copy. It has forgotten what it acknowledged since, so it answers nothing.
    """

    code = "DISK_ROLLED_BACK"
    hint = (
        "Put back the disk as it was last, if it still exists, and restart its node. A snapshot of a disk can't be used"
        " in its place, however new it is: what the disk acknowledged after it would be forgotten. Otherwise replace"
        " the disk, as `storaged explain DISK_BLANK` describes."
    )


class DiskDamaged(DiskForeign):
    """The disk's metadata store is damaged: its redo log, or a record without which the others say nothing, is gone,
    cut short or not what was written. What the disk acknowledged is not all there, so it answers nothing.
    """

    code = "DISK_DAMAGED"
    hint = (
        "Nothing is lost: other disks have what it held. Look at the kernel log and at the disk's own report (smartctl)"
        " for errors. If files of the disk were changed or put back from a copy, put back all of them as they were"
        " last, and restart its node. Otherwise replace the disk, as `storaged explain DISK_BLANK` describes."
    )


class DiskLost(OperatorError):
    """The disk is back, and a layout calls it lost for good: an administrator has said that it is powered off for ever,
    and the cluster has gone on without what it has. It answers nothing any more, and never will again.
    """

    code = "DISK_LOST"
    hint = (
        "Take the disk out of its node's config.toml, and restart the node. To use the hardware again, wipe the disk"
        " and give it to a node under a new id (`storaged disk add`). If it has objects that were lost, keep it as it"
        " is, powered off: nothing of the program reads it, but its files are not gone."
    )


class DiskBlank(OperatorError):
    """The disk is blank, although the cluster is in use. The disk was replaced or wiped, or is not mounted. A blank
    disk would answer "never written" for what the disk before it had acknowledged, so it answers nothing.
    """

    code = "DISK_BLANK"
    hint = (
        "Put back the disk, or the mount, that was there, and restart the node. A copy of the old disk is as good if it"
        " is complete (ddrescue without errors) and was made after the disk was used last. If the disk is gone, replace"
        " it by a new one with a new id: `storaged disk replace` where the authority's keys are, then `cluster"
        " layout` and, on a gateway, `cluster apply`. Nothing is lost meanwhile. No command makes a blank disk take"
        " part under the old id."
    )


class DiskWaits(OperatorError):
    """The disk waits for other nodes: it takes part when a majority of the storage nodes confirms what they remember of
    it. A new cluster begins when all its storage nodes are up. A new disk also waits for the layout that names it.
    """

    code = "DISK_WAITS"
    hint = (
        "Start the storage nodes that are named, or repair the network to them. If no layout in force gives the disk to"
        " its node, bring one into force that does: `storaged cluster layout` where the authority's keys are, then"
        " `storaged cluster apply` on a gateway. The disk joins by itself, and needs no restart."
    )


class ClaimRefused(OperatorError):
    """A statement about disks is not believed: it is not signed by the node that owns these disks, or is no statement
    of this cluster. It changes nothing.
    """

    code = "CLAIM_REFUSED"
    hint = (
        "No honest node of this cluster sends one. Look in the log and the audit log for the node that did; its"
        " certificate or its machine may be in other hands."
    )


class DiskHung(OperatorError):
    """The disk does not answer: since its node tried to open it, or for more than five seconds. The node runs without
    the disk, which takes part again by itself once it answers.
    """

    code = "DISK_HUNG"
    hint = (
        "Look at the kernel log for I/O errors and time-outs. After a crash a disk with a long log may take minutes;"
        " replace one that hangs."
    )


class DiskUnreadable(OperatorError):
    """The drive can't read a part of the disk's metadata or of its index. The node runs without the disk."""

    code = "DISK_UNREADABLE"
    hint = (
        "Nothing is lost: other disks have what it held. Look at the kernel log for the sector, and replace the disk"
        " (`storaged disk replace`). A complete copy of it (ddrescue without errors) in its place is as good."
    )


class DiskChecked(OperatorError):
    """The process before this one died because a drive could not read a page of a disk's metadata (SIGBUS). So the
    node reads the metadata of all its disks before it opens them. Each disk takes part as soon as it was read.
    """

    code = "DISK_CHECKED"
    hint = "Wait: a disk takes a minute for each 10 GiB of metadata, or so. `status` then names the unreadable one."


class DiskReadOnly(OperatorError):
    """The disk refused a write or a sync, or has no room for its metadata.

    After a failed write or sync it stays read-only: the kernel may have dropped what it could not write, so what the
    disk holds counts for nothing, although it can be read. Without room it goes on by itself when there is some.
    """

    code = "DISK_READ_ONLY"
    hint = (
        "Look at the kernel log for I/O errors, and replace the disk (`storaged disk replace`): meanwhile repair writes"
        " elsewhere what it should hold. If the reason is want of room, free some, or raise limits.meta_map_bytes and"
        " restart the node."
    )


class IndexDamaged(OperatorError):
    """The index of a disk's fragments cannot be read. The fragments themselves are not affected."""

    code = "INDEX_DAMAGED"
    hint = "Stop the node and run `storaged fsck --rebuild-index DISK`: it builds the index again from the segments."


class DiskFull(OperatorError):
    """The disk is full up to its reserve: it refuses new fragments, or rows that take room.

    Writes use the other disks as long as these can hold them. Then every write that takes room is refused with 507
    InsufficientStorage; reads, listings and deletes go on. Half of the reserve is kept for deletes alone.
    """

    code = "DISK_FULL"
    hint = (
        "Delete data, add disks, or enlarge its file system: the disk takes writes again by itself. What was deleted is"
        " given back after limits.retire_delay_s. The reserve is limits.reserve_bytes."
    )


class CertificateRefused(OperatorError):
    """The peer's certificate was refused."""

    code = "CERTIFICATE_REFUSED"
    hint = (
        "Certificates come from this cluster's own authority, and must carry country, site, rack and roles inside the"
        " policy."
    )


class CertificateRevoked(CertificateRefused):
    """The certificate is revoked: a signed layout says that its key may be in other hands."""

    code = "CERTIFICATE_REVOKED"
    hint = (
        "If the node is still a member, give it a new certificate for a new key: `storaged cluster renew` where the"
        " authority's keys are, `storaged node join` on its server, then reload it. A revocation ends only with the"
        " certificate."
    )


class TicketInvalid(OperatorError):
    """The ticket can't be read, or was altered."""

    code = "TICKET_INVALID"
    hint = "Copy the whole line that `storaged node invite` printed, or invite the node again. Nothing was changed."


class TicketExpired(OperatorError):
    """The ticket is too old."""

    code = "TICKET_EXPIRED"
    hint = (
        "Compare the clocks of both machines. Then invite the node again; `--valid 24h` makes a ticket that lasts"
        " longer. Nothing was changed."
    )


class TicketUsed(OperatorError):
    """The ticket was used already: each signs one certificate."""

    code = "TICKET_USED"
    hint = (
        "If that certificate is on its server, all is well. If you did not make that request, somebody else has read"
        " the ticket: `storaged cluster revoke AUTHORITY NODE`. For another certificate make a new ticket: `storaged"
        " node invite`, or `storaged cluster renew` for a member. Nothing was changed."
    )


class TicketForeign(OperatorError):
    """The ticket, or the request, is of another cluster or another authority."""

    code = "TICKET_FOREIGN"
    hint = (
        "Use the folder of the authority that made the ticket, or invite the node with this one. Nothing was changed."
    )


class JoinRefused(OperatorError):
    """A request or an answer does not belong to the ticket, or to this node."""

    code = "JOIN_REFUSED"
    hint = (
        "Copy the files again, and check that ticket, directory and files belong to one node. If they do, somebody may"
        " have exchanged a file on its way. Nothing was changed."
    )


class JurisdictionRefused(OperatorError):
    """The node is not certified inside the jurisdiction that the policy allows."""

    code = "JURISDICTION_REFUSED"
    hint = (
        "Only EU members and territories under EU law are admitted. Nodes record in their audit logs which peers they"
        " refuse."
    )


class LayoutRefused(OperatorError):
    """The node was offered a layout that it refuses. It keeps the layout that it has, and nothing is lost.

    The refused layout is not signed by this cluster's administration key, or it is a second one under a known epoch. Or
    it moves replicas or disks, and either does not follow the layout in force, or the nodes with seed disks have not
    accepted it.
    """

    code = "LAYOUT_REFUSED"
    status = 409
    hint = (
        "A layout that moves data comes into force by `storaged cluster apply FILE` on a gateway, after those that were"
        " signed before it. If another cluster's or administrator's `layout.signed` is beside the node's certificate,"
        " put this cluster's layout back there, and reload the node."
    )


class UnlockRefused(OperatorError):
    """The lock of a version is not ended. Nothing was changed.

    Before its time a lock ends only by two people: the holder of the administration key signs an order for one version,
    and the operator of a gateway whose configuration allows it carries it out while it counts.
    """

    code = "UNLOCK_REFUSED"
    status = 403
    hint = (
        "`storaged bucket sign-unlock AUTHORITY ...` signs an order. `break_glass = true` in [s3] of a gateway's"
        " configuration, and a restart, allow it there; take that out again afterwards."
    )


class VoteRefused(OperatorError):
    """A vote on disks that are away, or a record of disks that are out, does not count: it is not signed by a storage
    node of the layout, or no majority agrees. It changes nothing.
    """

    code = "VOTE_REFUSED"
    hint = (
        "While a new layout spreads this passes. Otherwise no honest node of this cluster sends one: look in the log of"
        " the gateway for the node that did; its certificate or its machine may be in other hands."
    )


class LayoutUnsafe(OperatorError):
    """No layout can be made from the list of nodes and disks: it would have too few racks, nodes or disks for the
    profile or for the replicas of metadata, or a drain would end what the cluster survives today.
    """

    code = "LAYOUT_UNSAFE"
    hint = (
        "Nothing was changed. First add a server or a disk in another rack (`storaged node invite`, `storaged disk"
        " add`; before the first start: `storaged cluster issue`), let disks that drain take part again (`storaged node"
        " undrain`), or name the operator of each rack (`storaged rack operator`) where that is what the text asks for."
        " `storaged cluster plan` shows what a layout survives."
    )


class LayoutOvertaken(OperatorError):
    """Another layout was decided first. This one was signed without knowing it, and is not used anywhere. Nothing is
    lost.
    """

    code = "LAYOUT_OVERTAKEN"
    status = 409
    hint = (
        "Fetch the layout that was decided (on a gateway: `storaged cluster fetch FILE`), and take it as the last one"
        " of the folder with the authority's keys (`storaged cluster adopt AUTHORITY FILE`). `storaged cluster plan"
        " AUTHORITY` then shows how that folder's list differs: nodes and disks that the other administrator added or"
        " removed belong into both. Then sign again: `storaged cluster layout AUTHORITY`."
    )


class LayoutNotAccepted(OperatorError):
    """The layout was decided, but too few nodes have accepted it. All nodes continue with the layout that they
    have. Nothing is lost.
    """

    code = "LAYOUT_NOT_ACCEPTED"
    status = 503
    hint = (
        "Start the storage nodes that are named, or repair the network to them, and run the same `storaged cluster"
        " apply` again, on any gateway. No other layout can be applied before this one."
    )


class NoQuorum(OperatorError):
    """The system partition has no majority, so that no layout can be decided. Nothing was changed, or the layout was
    decided and is not used yet.
    """

    code = "NO_QUORUM"
    status = 503
    hint = "`storaged status` names what is away. Start it, and run the same command again."


class AuditUnwritable(OperatorError):
    """The audit log cannot be written. Operations that must be audited (such as the release of a key) are refused until
    it can.
    """

    code = "AUDIT_UNWRITABLE"
    hint = "Look at the space and the permissions of the node's audit directory, and at the kernel log for I/O errors."


class AdminNotAllowed(OperatorError):
    """Only root and the user that the node runs as may use its admin socket."""

    code = "ADMIN_NOT_ALLOWED"
    hint = (
        "Run the command as root (sudo), or as the node's own user: storaged-gateway for gateways, storaged for storage"
        " nodes."
    )


class PassphraseTooShort(OperatorError):
    """A passphrase that protects keys must be longer."""

    code = "PASSPHRASE_TOO_SHORT"
    status = 400
    hint = "Use 12 characters or more: four or five random words are easy to remember."


class AuditBroken(OperatorError):
    """The audit log was altered: an entry does not follow from the one before, or is not the one that a witness saw."""

    code = "AUDIT_BROKEN"
    hint = (
        "Keep a copy of the directory as it is. Entries before the first one named are unchanged. If only the tail of"
        " the newest chain is missing, and the node still writes, the copy may be older than what the witnesses saw"
        " since: copy the log again, and verify that copy."
    )
    exit_code = 3


class AuditNotCompared(OperatorError):
    """The audit log is consistent in itself, but could not be compared with every witness of it."""

    code = "AUDIT_NOT_COMPARED"
    hint = (
        "Start the storage nodes that are away and verify again. The owner of a node can rewrite its log so that only"
        " witnesses notice."
    )
    exit_code = 4
