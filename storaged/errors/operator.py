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


class PortInUse(OperatorError):
    """The address is already in use by another program."""

    code = "PORT_IN_USE"
    hint = "Choose another port (for the trial cluster: `storaged dev --s3-port N`), or stop the program that has it."


class NotRunning(OperatorError):
    """The cluster does not answer."""

    code = "NOT_RUNNING"
    exit_code = 2
    hint = "Start it with `storaged dev DIR`, or name another with --dir or STORAGED_DIR."


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
    """The disk's store is not the one that this node had under this name. Its promises are unknown, so it must not
    answer.
    """

    code = "DISK_FOREIGN"
    hint = (
        "Put back the disk or the mount that was there, and restart its node. If it is gone: repair rebuilds its"
        " fragments on other disks, but not its replicas of records; those stay one short, and keys that lose another"
        " replica stop. About a blank one in its place: `storaged explain DISK_BLANK`."
    )


class DiskBlank(OperatorError):
    """The disk is blank, or its node has no record of the store on it, although the cluster is in use.

    The server was rebuilt, the disk was replaced, or the node lost its directory. The disk may have forgotten writes
    that it acknowledged, so it takes no part. At the first start of a new cluster this means only that not all storage
    nodes have started yet: start them, and do nothing else.
    """

    code = "DISK_BLANK"
    hint = (
        "A new cluster at its first start: start the other storage nodes, and accept nothing. Else put back the disk,"
        " or the node's directory (`disks.json` in it), that was there, and restart the node. If it is gone, the others"
        " go on without it. `storaged accept-blank CONFIG.toml DISK` lets it take part as it is: then a write that only"
        " this disk and one that is away had acknowledged is forgotten, so do it only while all other disks are in use"
        " and `status` shows no object below target."
    )


class DiskHung(OperatorError):
    """The disk has not answered since its node tried to open it. The node runs without the disk, which joins by itself
    once it is open.
    """

    code = "DISK_HUNG"
    hint = (
        "Look at the kernel log for I/O errors and time-outs. After a crash a disk with a long log may take minutes;"
        " replace one that hangs."
    )


class DiskReadOnly(OperatorError):
    """The disk refused a write or a sync; it is read-only until its node is started again."""

    code = "DISK_READ_ONLY"
    hint = (
        "Look at the kernel log for I/O errors. Remove the cause, then restart the node; until then repair rebuilds"
        " elsewhere what it should hold."
    )


class IndexDamaged(OperatorError):
    """The index of a disk's fragments cannot be read. The fragments themselves are not affected."""

    code = "INDEX_DAMAGED"
    hint = "Stop the node and run `storaged fsck --rebuild-index DISK`: it builds the index again from the segments."


class DiskFull(OperatorError):
    """The disk is full up to its reserve and refuses new fragments."""

    code = "DISK_FULL"
    hint = (
        "Delete data, or enlarge its file system; writes use the other disks meanwhile. The reserve"
        " (limits.reserve_bytes) stays free for deletes and the ring."
    )


class CertificateRefused(OperatorError):
    """The peer's certificate was refused."""

    code = "CERTIFICATE_REFUSED"
    hint = (
        "Certificates come from this cluster's own authority, and must carry country, site, rack and roles inside the"
        " policy."
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

    The refused layout is not signed by this cluster's administration key, is a second one under a known epoch, or would
    move replicas or disks, which this release can't do.
    """

    code = "LAYOUT_REFUSED"
    hint = (
        "Put the cluster's layout back where the wrong one was offered from (`layout.signed` beside the node's"
        " certificate), and reload. Only addresses, roles and nodes without disks may change."
    )


class LayoutMovesData(OperatorError):
    """The new layout would move replicas or disks of a cluster that is in use. This release can't copy their data,
    which would be lost.
    """

    code = "LAYOUT_MOVES_DATA"
    hint = (
        "Disks, storage nodes, racks and weights must stay as they are in the last layout. Undo what differs (for a"
        " node that should not have been issued: `storaged cluster remove DIRECTORY NODE`). Addresses, certificates and"
        " gateways may change."
    )


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
    hint = "Keep a copy of the directory as it is. Entries before the first one named are unchanged."
    exit_code = 3


class AuditNotCompared(OperatorError):
    """The audit log is consistent in itself, but could not be compared with every witness of it."""

    code = "AUDIT_NOT_COMPARED"
    hint = (
        "Start the storage nodes that are away and verify again. The owner of a node can rewrite its log so that only"
        " witnesses notice."
    )
    exit_code = 4
