"""Named states of the cluster that ``storaged status`` lists as problems. They are never raised."""

from __future__ import annotations

from storaged.errors.base import Condition


class AuditRefusedByWitness(Condition):
    """A node's audit log differs from what its witnesses saw: it was rewritten, cut, lost, or restored from a copy."""

    code = "AUDIT_REFUSED_BY_WITNESS"
    hint = (
        "Copy the node's audit directory away before anything else, then: storaged audit verify COPY. It names the"
        " first entry that differs from what was seen."
    )


class ChosenFellBack(Condition):
    """A gateway found a register back at an older record than one that it had seen chosen: an acknowledged write was
    undone.
    """

    code = "CHOSEN_FELL_BACK"
    hint = (
        "After `storaged cluster recover --unsafe` this is what was lost. Otherwise disks were put back from copies, or"
        " nodes are hostile: two of the register's three replicas. Keep the log of the gateway, which names the"
        " register, and find out which nodes hold it (storaged where)."
    )


class NodeDown(Condition):
    """The node does not answer."""

    code = "NODE_DOWN"
    hint = (
        "Start it (systemctl start; in a trial cluster `storaged dev start NODE`). If the reason names protocol"
        " versions, the node runs, but with another version: install one version on all nodes. While a node with disks"
        " is away, writes use other disks, and repair catches it up."
    )


class NodeDirectoryUnwritable(Condition):
    """A storage node can't write to its own directory: mostly because that file system is full. It goes on, but would
    not start again, and does not remember what it hears of other nodes' disks.
    """

    code = "NODE_DIRECTORY_UNWRITABLE"
    hint = (
        "Make room in the file system of the node's directory (`directory` in its config.toml), or mend its"
        " permissions. Do not restart the node before."
    )


class DiskFilling(Condition):
    """Less than a tenth of the disk is free for data. ``status`` says when it is full, at the pace of the last hour.

    This is a warning: the verdict of ``status`` stays as it is.
    """

    code = "DISK_FILLING"
    hint = (
        "Add disks or servers, or delete data, before the disk is full: `storaged cluster plan` says how much a change"
        " moves. Then writes that take room are refused."
    )


class DiskSlow(Condition):
    """The disk is much slower than the others: ten times as slow or more, or one of its operations has not ended for
    half a second. It gets no new fragments and is asked last, and takes part as before when it is well again.

    This is a warning: the verdict of ``status`` stays as it is. At most a third of the disks is left out like this.
    """

    code = "DISK_SLOW"
    hint = (
        "Look at the kernel log and at the disk's own report (smartctl) for errors: a drive that repeats its reads is"
        " about to fail. Otherwise other programs use the disk, or its path is congested. Replace a disk that stays"
        " slow (`storaged disk replace`). The metric storaged_disk_latency_seconds has the history of each disk."
    )


class DiskDown(Condition):
    """The disk does not take part: its node refuses it or it failed."""

    code = "DISK_DOWN"
    hint = (
        "See the node's log for the reason. Remove the cause (mount, permissions, cable), then restart the node. If the"
        " node does not have the disk because another one takes its place, apply the layout that exchanges them"
        " (`storaged cluster apply` on a gateway)."
    )


class DiskOut(Condition):
    """The disk has been away for so long that the cluster replaces it: a majority of the storage nodes voted it out,
    and the partitions that it held move to other disks. Nothing is lost by this, even if the disk is sound.
    """

    code = "DISK_OUT"
    hint = (
        "If the disk or its server is gone for good: `storaged disk remove` or `storaged node remove`, and sign a "
        "layout. If it returns, do nothing: when it has answered for a while, it gets its share back. The delays "
        "are in the layout (`storaged cluster sparing`). `status` says what still waits. A seed disk that is gone "
        "for good has to be removed before another one fails: only signed layouts replace it. Where too few racks "
        "are left to replace a disk, keys and objects stay readable and writable, and the failure of one more rack"
        " stops some of them: bring the rack back, or add a server in another rack."
    )


class SeedDiskOut(Condition):
    """A seed disk is out: one with a part of the system partition, which has the users, the buckets and where
    everything is. Another disk takes its place by itself, by a layout that was signed beforehand for this case. When
    one seed disk too many is away, no user can log in, and nothing can be made or changed, until one is back.
    """

    code = "SEED_DISK_OUT"
    hint = (
        "If the detail says that another disk takes its place, do nothing: that takes minutes. Otherwise, and if it "
        "will not be back soon, where the authority's keys are: `storaged disk remove"
        " AUTHORITY NODE DISK` (`storaged node remove AUTHORITY NODE` for a server), and `storaged cluster layout"
        " AUTHORITY`. It signs layouts that bring another seed disk. Apply them on a gateway, one after the other:"
        " `storaged cluster apply FILE`. Each rack has one seed disk at most: where no rack is left without one, add a"
        " server in another rack first, or a disk in the same one. If a majority of the seed disks is gone for good:"
        " `storaged cluster losses` and `storaged cluster recover`."
    )


class SeedNotSpared(Condition):
    """A warning: when this seed disk is lost, no other one takes its place by itself, though one could. The
    administration key has signed no layout for this case: the layout in force was signed by an earlier version, or what
    was signed has been used, since seed disks were lost.
    """

    code = "SEED_NOT_SPARED"
    hint = (
        "On a gateway: `storaged cluster fetch FILE`. Where the authority's keys are: `storaged cluster adopt AUTHORITY"
        " FILE`, `storaged cluster plan AUTHORITY` (it shows what differs; remove what is gone for good), `storaged"
        " cluster layout AUTHORITY`. Then `storaged cluster apply` on a gateway. Each layout comes with what may follow"
        " it when a seed disk is lost."
    )


class SparingLacksRoom(Condition):
    """Disks that are away are not replaced, or not by all others: what they had does not fit on the disks that are
    left, beside what each keeps free, and with no more of it in a failure domain than may be there. ``status`` says how
    many bytes are short, and where. Nothing is lost by this: what was begun ends, what has no spare left is written
    anew as far as there is room, and the rest goes on by itself when there is more.
    """

    code = "SPARING_LACKS_ROOM"
    hint = (
        "Bring the disks back, if they can be. Else make room: add disks or a server (`storaged disk add`, `storaged "
        "node invite`), or delete data; what was deleted gives its room back after an hour (`[limits] retire_delay_s`)."
    )


class ObjectsBelowTarget(Condition):
    """Some objects have fewer fragments than the profile asks for."""

    code = "OBJECTS_BELOW_TARGET"
    hint = "Repair rebuilds them as soon as enough disks are available: `storaged repair status --wait`."


class RepairWaitsForGateway(Condition):
    """Repair has to change where objects are, and no gateway answers the storage nodes. Only gateways change records.
    Damaged and missing fragments are still rebuilt where they were.
    """

    code = "REPAIR_WAITS_FOR_GATEWAY"
    hint = (
        "Start a gateway, or look why it can't reach the storage nodes (NODE_DOWN on the gateway, its log). Repair goes"
        " on within a minute; nothing is lost meanwhile unless more disks fail."
    )


class ObjectsLost(Condition):
    """Some objects have too few fragments left to be read, on all disks together. The return of a disk that is away
    would not help.
    """

    code = "OBJECTS_LOST"
    hint = (
        "`storaged where` names what is missing. If a disk was wiped or replaced, put the old one back; else write"
        " these objects again from another copy."
    )


class ObjectsUnreadable(Condition):
    """Some objects cannot be read until disks that are away return. They are not lost unless those disks are."""

    code = "OBJECTS_UNREADABLE"
    hint = "Bring back the nodes and disks that are away; `storaged where` names those of an object."


class SystemRecordDamaged(Condition):
    """The record of a bucket or a user was not written by a gateway of this cluster, and no majority of its replicas
    holds one that was.
    """

    code = "SYSTEM_RECORD_DAMAGED"
    hint = (
        "Only this bucket or user is affected: it is refused, others are served. A storage node wrote the record, or a"
        " majority of its disks are damaged: look at their logs. Create a user again (`storaged user remove"
        " ACCESS_KEY`, then `user add`)."
    )


class BucketNotVerified(Condition):
    """Storage nodes can't verify the record of a bucket, so its countries are uncertain. They do not judge, rebuild or
    move its objects.
    """

    code = "BUCKET_NOT_VERIFIED"
    hint = (
        "A gateway of this version signs records from before within a minute of its start. A record that stays so was"
        " not written by a gateway: look at the storage nodes' logs, and at SYSTEM_RECORD_DAMAGED. Clients read and"
        " write other buckets as before."
    )


class ObjectsNotCounted(Condition):
    """Repair has not yet checked all objects since a disk came or went. How many are below target is unknown."""

    code = "OBJECTS_NOT_COUNTED"
    hint = "It counts them now; look again in a moment, or wait with `storaged repair status --wait`."


class QuorumLost(Condition):
    """Some registers have no majority of their replicas. Their keys can be neither read nor written until a replica
    returns.
    """

    code = "QUORUM_LOST"
    hint = "Start the nodes that are down."


class KeysNotBackedUp(Condition):
    """The keyring has no backup that covers its newest epoch key. Losing the gateway would lose every object."""

    code = "KEYS_NOT_BACKED_UP"
    hint = "Run `storaged keys backup FILE` and keep the file and its passphrase off this machine."


class KeyReleasesRefused(Condition):
    """The policy does not allow this gateway to have keys. Its certificate does not match the countries and
    jurisdictions, or is not valid now.
    """

    code = "KEY_RELEASE_REFUSED"
    hint = (
        "The rule and its reason are in `storaged doctor`, in the answer to the client (503) and in the audit log"
        " (key.refused). certificate validity: check the clock, or give the gateway a new certificate (`storaged"
        " cluster renew`) and reload. cluster countries, cluster jurisdictions: this gateway is not certified inside"
        " the policy of the layout in force. bucket countries: use a gateway in one of the bucket's countries."
    )


class BucketKeyDamaged(Condition):
    """The ring's record of a bucket's key was removed or overwritten, but not by a gateway. The cause is a damaged
    disk, or an attack with a node's certificate.
    """

    code = "BUCKET_KEY_DAMAGED"
    hint = (
        "Mended: this gateway wrote it again from its own copy; find the cause (audit log: key.restore). Not"
        " mended: no copy here opens. Other gateways mend it from theirs when they use the bucket; else restore the"
        " newest backup (`storaged keys restore FILE`, then reload the gateway). Until then the bucket's objects cannot"
        " be read."
    )


class ClockSkewed(Condition):
    """A node's clock differs from the gateway's by more than a few seconds."""

    code = "CLOCK_SKEWED"
    hint = "Run an NTP client. Safety does not depend on clocks; signatures and dates do."
