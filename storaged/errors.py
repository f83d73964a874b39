"""Every error that reaches a user: whose fault, what happened, what to do.

The S3 code, HTTP status, exit code and hint sit on one class; ``storaged explain CODE`` and the S3 error body are made
from them.

    StoragedError
      S3Error                  answers of the S3 front; the code is the class name, as AWS documents it
        BadRequest family      400 ...
        Unavailable            503, the client should retry (SlowDown, ServiceUnavailable)
      OperatorError            shown by the command line and in the log; the code is SHOUTED
      Condition                a named state of the cluster that ``storaged status`` lists as a problem (never raised)
      PeerError                trouble between nodes; turned into one of the above before a user sees it

S3 codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class StoragedError(Exception):
    """Something went wrong.

    ``message`` defaults to the first line of the class's docstring. ``details`` are extra named facts
    (they become elements of the S3 error body, such as ``<Region>``).
    """

    code: ClassVar[str] = "ERROR"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    hint: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if "code" not in cls.__dict__:
            cls.code = cls.__name__

    def __init__(self, message: str = "", **details: str) -> None:
        self.message = message or (type(self).__doc__ or self.code).strip().splitlines()[0]
        self.details = details
        super().__init__(self.message)


class S3Error(StoragedError):
    """An S3 request was refused."""

    status = 400


# --- 304 and 4xx: the request -----------------------------------------------------------------------------------------


class NotModified(S3Error):
    """Not Modified

    The object is the one that the client has: If-None-Match names its ETag, or it has not changed since
    If-Modified-Since.
    """

    status = 304


class AccessDenied(S3Error):
    """Access Denied

    The key of the request may not do this: the bucket belongs to another user, the request is not signed, or what was
    signed
    (a presigned URL, a form's policy) is over or does not allow it.
    """

    hint = "`storaged bucket list` shows whose a bucket is; `storaged user list` shows who has which access key."

    status = 403


class AccessForbidden(S3Error):
    """CORSResponse: CORS is not enabled for this bucket."""

    status = 403


class AuthorizationHeaderMalformed(S3Error):
    """The authorization header that you provided is not valid."""


class AuthorizationQueryParametersError(S3Error):
    """X-Amz-Algorithm only supports "AWS4-HMAC-SHA256"."""


class BadDigest(S3Error):
    """The Content-MD5 or checksum value that you specified did not match what the server received."""


class BadRequest(S3Error):
    """The request is not well-formed HTTP."""


class BucketAlreadyExists(S3Error):
    """The requested bucket name is not available. The bucket namespace is shared by all users. Choose another name."""

    status = 409


class BucketAlreadyOwnedByYou(S3Error):
    """The bucket that you tried to create already exists, and you own it."""

    status = 409


class BucketNotEmpty(S3Error):
    """The bucket that you tried to delete is not empty."""

    status = 409


class ConditionalRequestConflict(S3Error):
    """A conflicting operation occurred during the conditional request. Retry it."""

    status = 409


class EntityTooLarge(S3Error):
    """Your proposed upload exceeds the maximum allowed object size."""


class EntityTooSmall(S3Error):
    """Your proposed upload is smaller than the minimum allowed object size. Each part but the last
    has at least 5 MiB.
    """


class ExpiredToken(S3Error):
    """The provided token has expired."""


class IncompleteBody(S3Error):
    """You did not provide the number of bytes specified by the Content-Length HTTP header."""


class InvalidAccessKeyId(S3Error):
    """The access key ID that you provided does not exist in our records."""

    status = 403


class InvalidAction(S3Error):
    """The action or operation requested is not valid: this endpoint answers S3 requests only."""


class InvalidArgument(S3Error):
    """Invalid Argument

    A header, a parameter or a field of the request has a value that S3 does not allow. The message of the answer names
    it,
    and nothing was changed.
    """

    hint = "Read the message of the answer: it says which value, and what is allowed."


class InvalidBucketName(S3Error):
    """The specified bucket is not valid."""

    hint = (
        "A bucket's name has 3 to 63 characters: lower-case letters, digits, dots and hyphens. It begins and ends with"
        " a letter or digit, is no IP address, has no two dots in a row, and does not begin with xn-- or sthree-."
    )


class InvalidBucketState(S3Error):
    """The request is not valid for the current state of the bucket."""

    status = 409


class InvalidDigest(S3Error):
    """The Content-MD5 or checksum value that you specified is not valid."""


class InvalidLocationConstraint(S3Error):
    """The specified location constraint is not valid."""


class InvalidChunkSizeError(S3Error):
    """A chunk of the body is larger than the maximum allowed."""


class InvalidPart(S3Error):
    """One or more of the specified parts could not be found. The part might not have been uploaded, or its ETag
    differs.
    """


class InvalidPartNumber(S3Error):
    """The requested partnumber is not satisfiable."""

    status = 416


class InvalidPartOrder(S3Error):
    """The list of parts was not in ascending order. The parts list must be specified in order by part number."""


class InvalidRange(S3Error):
    """The requested range is not satisfiable."""

    status = 416


class InvalidRequest(S3Error):
    """Invalid Request

    The request is well formed, but its parts do not go together: a header without the one that it needs, or two that
    exclude each other. The message of the answer says which, and nothing was changed.
    """

    hint = "Read the message of the answer: it says what is missing or too much."


class InvalidPolicyDocument(S3Error):
    """The content of the form does not meet the conditions specified in the policy document."""


class InvalidStorageClass(S3Error):
    """The storage class that you specified is not valid."""


class InvalidTag(S3Error):
    """The tag provided was not a valid tag."""


class InvalidToken(S3Error):
    """The provided token is malformed or otherwise not valid: no temporary credentials are issued here."""


class InvalidURI(S3Error):
    """The specified URI couldn't be parsed."""


class KeyTooLongError(S3Error):
    """Your key is too long: the limit is 1024 bytes."""


class MalformedACLError(S3Error):
    """The XML that you provided was not well formed or did not validate against our published schema."""


class MalformedPOSTRequest(S3Error):
    """The body of your POST request is not well-formed multipart/form-data."""


class MalformedTrailerError(S3Error):
    """The request contained trailing data that was not well formed or did not conform to our published schema."""


class MalformedXML(S3Error):
    """The XML that you provided was not well formed or did not validate against our published schema."""


class MaxMessageLengthExceeded(S3Error):
    """Your request was too large."""


class MetadataTooLarge(S3Error):
    """Your metadata headers exceed the maximum allowed metadata size (2 KiB)."""


class MethodNotAllowed(S3Error):
    """The specified method is not allowed against this resource."""

    status = 405


class MissingContentLength(S3Error):
    """You must provide the Content-Length HTTP header."""

    status = 411


class MissingRequestBodyError(S3Error):
    """Request Body is empty.

    The operation takes a document (XML), and the request brought none.
    """


class MissingSecurityHeader(S3Error):
    """Your request is missing a required header."""


class NoSuchBucket(S3Error):
    """The specified bucket does not exist."""

    status = 404


class NoSuchBucketPolicy(S3Error):
    """The bucket policy does not exist"""

    status = 404


class NoSuchCORSConfiguration(S3Error):
    """The CORS configuration does not exist"""

    status = 404


class NoSuchConfiguration(S3Error):
    """The specified configuration does not exist."""

    status = 404


class NoSuchKey(S3Error):
    """The specified key does not exist."""

    status = 404


class NoSuchLifecycleConfiguration(S3Error):
    """The lifecycle configuration does not exist"""

    status = 404


class NoSuchPublicAccessBlockConfiguration(S3Error):
    """The public access block configuration was not found"""

    status = 404


class NoSuchTagSet(S3Error):
    """The TagSet does not exist."""

    status = 404


class NoSuchUpload(S3Error):
    """The specified multipart upload does not exist. The upload ID might be invalid, or the upload was aborted or
    completed.
    """

    status = 404


class NoSuchVersion(S3Error):
    """The version ID specified in the request does not match an existing version."""

    status = 404


class NoSuchWebsiteConfiguration(S3Error):
    """The specified bucket does not have a website configuration"""

    status = 404


class NotImplemented(S3Error):
    """A header or query that you provided implies functionality that is not implemented."""

    status = 501


class ObjectLockConfigurationNotFoundError(S3Error):
    """Object Lock configuration does not exist for this bucket"""

    status = 404


class OwnershipControlsNotFoundError(S3Error):
    """The bucket ownership controls were not found"""

    status = 404


class PreconditionFailed(S3Error):
    """At least one of the preconditions that you specified did not hold."""

    status = 412


class ReplicationConfigurationNotFoundError(S3Error):
    """The replication configuration was not found"""

    status = 404


class RequestHeaderSectionTooLarge(S3Error):
    """Your request header section exceeds the maximum allowed size."""


class RequestTimeTooSkewed(S3Error):
    """The difference between the request time and the server's time is too large."""

    status = 403


class RequestTimeout(S3Error):
    """Your socket connection to the server was not read from or written to within the timeout period."""


class ServerSideEncryptionConfigurationNotFoundError(S3Error):
    """The server side encryption configuration was not found"""

    status = 404


class SignatureDoesNotMatch(S3Error):
    """The request signature that the server calculated does not match the signature that you provided."""

    status = 403
    hint = "Check the secret key and the signing method; a proxy that rewrites the path or Host breaks signatures too."


class TooManyBuckets(S3Error):
    """You have attempted to create more buckets than are allowed."""


class XAmzContentSHA256Mismatch(S3Error):
    """The provided 'x-amz-content-sha256' header does not match what was computed."""


# --- 5xx: the store ---------------------------------------------------------------------------------------------------


class InternalError(S3Error):
    """An internal error occurred. Try again."""

    status = 500


class ServiceUnavailable(S3Error):
    """The store cannot do this safely now (too few disks, racks or replicas answer). Nothing was changed. Retry."""

    status = 503
    hint = (
        "See `storaged status`: a write needs enough disks to survive the loss of one more, a register two of its three"
        " replicas."
    )


class OutcomeUnknown(ServiceUnavailable):
    """The write may or may not have been applied: a replica stopped answering in the middle. Read, or retry."""

    code = "ServiceUnavailable"


class SlowDown(S3Error):
    """Please reduce your request rate."""

    status = 503


class KeyringUnavailable(ServiceUnavailable):
    """The keyring does not answer or is not this cluster's; nothing can be sealed or opened."""

    code = "ServiceUnavailable"
    hint = "See KEYRING_MISMATCH: `storaged explain KEYRING_MISMATCH`."


class KeyReleaseRefused(KeyringUnavailable):
    """The policy does not allow this gateway to have the key: the message names the rule."""

    code = "ServiceUnavailable"
    hint = "See KEY_RELEASE_REFUSED: `storaged explain KEY_RELEASE_REFUSED`."


class DataDamaged(ServiceUnavailable):
    """Too many fragments of this object are missing or damaged to read it now. Nothing unverified was sent."""

    code = "ServiceUnavailable"


# --- the operator's ---------------------------------------------------------------------------------------------------


class OperatorError(StoragedError):
    """A command or a daemon could not do what was asked."""

    code = "OPERATOR_ERROR"


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
    """This command is about trial clusters (`storaged dev`), and the directory is not one's."""

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
    hint = (
        "Name the one that you mean: `storaged --dir DIR ...`, or set STORAGED_DIR (`storaged --dir DIR env` prints"
        " it)."
    )


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
    """The disk's store is not the one this node had under this name: its promises are unknown, so
    it must not answer.
    """

    code = "DISK_FOREIGN"
    hint = (
        "Put back the disk or the mount that was there, and restart its node. If it is gone: repair rebuilds its"
        " fragments on other disks, but not its replicas of records; those stay one short, and keys that lose another"
        " replica stop. About a blank one in its place: `storaged explain DISK_BLANK`."
    )


class DiskBlank(OperatorError):
    """The disk is blank, or its node has no record of the store on it, although the cluster is in use: a server that
    was built anew, an exchanged disk, or a lost
    directory of the node. It may have forgotten writes that it acknowledged, so it takes no part. (At the first start
    of a new cluster: not all storage
    nodes are there yet. Then nothing is to be done but starting them.)"""

    code = "DISK_BLANK"
    hint = (
        "A new cluster at its first start: start the other storage nodes, and accept nothing. Else put back the disk,"
        " or the node's directory (`disks.json` in it), that was there, and restart the node. If it is gone, the others"
        " go on without it. `storaged accept-blank CONFIG.toml DISK` lets it take part as it is: then a write that only"
        " this disk and one that is away had acknowledged is forgotten, so do it only while all other disks are in use"
        " and `status` shows no object below target."
    )


class DiskHung(OperatorError):
    """The disk has not answered since its node tried to open it. The node runs without it; it joins by itself when it
    is open.
    """

    code = "DISK_HUNG"
    hint = (
        "Look at the kernel log for I/O errors and time-outs. After a crash a disk with a long log may take minutes;"
        " one that hangs is to be replaced."
    )


class DiskReadOnly(OperatorError):
    """The disk refused a write or a sync; it is read-only until its node is started again."""

    code = "DISK_READ_ONLY"
    hint = (
        "Look at the kernel log for I/O errors. Mend the cause, then restart the node; until then repair rebuilds"
        " elsewhere what it should hold."
    )


class IndexDamaged(OperatorError):
    """The index of a disk's fragments cannot be read. The fragments themselves are not affected."""

    code = "INDEX_DAMAGED"
    hint = "Stop the node and run `storaged fsck --rebuild-index DISK`: the index is made anew from the segments."


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
    hint = "Only EU members and territories under EU law are admitted. Nodes note whom they refuse in their audit logs."


class LayoutRefused(OperatorError):
    """A layout was offered that the node does not take: it is not signed by this cluster's administration key, is a
    second one under an epoch that is
    known, or would move replicas or disks, which this release can't do. The node goes on with the layout that it has;
    nothing is lost."""

    code = "LAYOUT_REFUSED"
    hint = (
        "Put the cluster's layout back where the wrong one was offered from (`layout.signed` beside the node's"
        " certificate), and reload. Only addresses, roles and nodes without disks may change."
    )


class LayoutMovesData(OperatorError):
    """The new layout would move replicas or disks of a cluster that is in use. This release can't carry over what lies
    there, so it would be lost.
    """

    code = "LAYOUT_MOVES_DATA"
    hint = (
        "Disks, storage nodes, racks and weights stay as they are in the last layout. Take back what differs (`storaged"
        " cluster remove DIRECTORY NODE` for a node that was issued too much). Addresses, certificates and gateways may"
        " change."
    )


class AuditUnwritable(OperatorError):
    """The audit log cannot be written; what must be audited (the release of a key) is refused until it can."""

    code = "AUDIT_UNWRITABLE"
    hint = "Look at the space and the permissions of the node's audit directory, and at the kernel log for I/O errors."


class AdminNotAllowed(OperatorError):
    """A node is administered by root and by the user that it runs as; nobody else may ask its admin socket."""

    code = "ADMIN_NOT_ALLOWED"
    hint = "Ask as root (sudo), or as the node's own user: storaged-gateway for gateways, storaged for storage nodes."


class PassphraseTooShort(OperatorError):
    """A passphrase that is to protect keys is too short."""

    code = "PASSPHRASE_TOO_SHORT"
    status = 400
    hint = "Take 12 characters or more: four or five random words are easier to keep than a short riddle."


class AuditBroken(OperatorError):
    """The audit log was altered: an entry does not follow from the one before, or is not the one that a witness saw."""

    code = "AUDIT_BROKEN"
    hint = "Keep a copy of the directory as it is. Entries before the first one named are as they were written."
    exit_code = 3


class AuditNotCompared(OperatorError):
    """The audit log is whole in itself, but not every witness of it could be compared."""

    code = "AUDIT_NOT_COMPARED"
    hint = (
        "Start the storage nodes that are away and verify again. Who owns a node can rewrite its log so that only"
        " witnesses notice."
    )
    exit_code = 4


# --- states that `storaged status` names
# --------------------------------------------------------------------------------


class Condition(StoragedError):
    """A state of the cluster, listed by ``storaged status``; never raised."""

    code = "CONDITION"


class AuditRefusedByWitness(Condition):
    """A node's audit log is not what its witnesses saw of it: it was rewritten, cut, lost, or put back from a copy."""

    code = "AUDIT_REFUSED_BY_WITNESS"
    hint = (
        "Copy the node's audit directory away before anything else, then: storaged audit verify COPY. It names the"
        " first entry that is not as it was seen."
    )


class NodeDown(Condition):
    """The node does not answer."""

    code = "NODE_DOWN"
    hint = (
        "Start it (systemctl start; of a trial cluster `storaged dev start NODE`). If the reason names protocol"
        " versions, it does run: install one version on all nodes. While a node with disks is away writes use other"
        " disks, and repair catches it up."
    )


class DiskDown(Condition):
    """The disk does not take part: its node refuses it or it failed."""

    code = "DISK_DOWN"
    hint = "See the node's log for the reason. When it is mended (mounted, permissions, cable), restart the node."


class ObjectsBelowTarget(Condition):
    """Some objects have fewer fragments than their bucket's profile asks for."""

    code = "OBJECTS_BELOW_TARGET"
    hint = "Repair rebuilds them as soon as enough disks are there: `storaged repair status --wait`."


class ObjectsLost(Condition):
    """Some objects have fewer fragments than are needed to read them, on all disks together: no disk that is merely
    away would help.
    """

    code = "OBJECTS_LOST"
    hint = (
        "`storaged where` names what is missing. If a disk was wiped or exchanged, put the old one back; else write"
        " these objects again from another copy."
    )


class ObjectsUnreadable(Condition):
    """Some objects cannot be read until disks that are away return. Nothing of them is lost as long as those disks are
    not.
    """

    code = "OBJECTS_UNREADABLE"
    hint = "Bring back the nodes and disks that are away; `storaged where` names those of an object."


class SystemRecordDamaged(Condition):
    """The record of a bucket or a user is not one that a gateway of this cluster wrote, and no majority of its replicas
    holds one that is.
    """

    code = "SYSTEM_RECORD_DAMAGED"
    hint = (
        "Only this bucket or user is affected: it is refused, others are served. A storage node wrote the record, or a"
        " majority of its disks are damaged: look at their logs. A user is made anew (`storaged user remove"
        " ACCESS_KEY`, then `user add`)."
    )


class BucketNotVerified(Condition):
    """Storage nodes can't verify the record of a bucket: its objects are not judged, rebuilt or moved, since its
    countries are not known for sure.
    """

    code = "BUCKET_NOT_VERIFIED"
    hint = (
        "A gateway of this version signs records from before within a minute of its start. A record that stays so was"
        " not written by a gateway: look at the storage nodes' logs, and at SYSTEM_RECORD_DAMAGED. Clients read and"
        " write other buckets as before."
    )


class ObjectsNotCounted(Condition):
    """Repair has not yet looked at all objects since a disk came or went: how many are below target is not known."""

    code = "OBJECTS_NOT_COUNTED"
    hint = "It counts them now; look again in a moment, or wait with `storaged repair status --wait`."


class QuorumLost(Condition):
    """Some registers have no majority of their replicas: their keys can be neither read nor written
    until one returns.
    """

    code = "QUORUM_LOST"
    hint = "Start the nodes that are down."


class KeysNotBackedUp(Condition):
    """The keyring has no backup that covers its newest epoch key. Losing the gateway would lose every object."""

    code = "KEYS_NOT_BACKED_UP"
    hint = "Run `storaged keys backup FILE` and keep the file and its passphrase off this machine."


class KeyReleasesRefused(Condition):
    """The policy does not allow this gateway to have keys: certificate, countries and jurisdictions do not agree, or
    the certificate is not valid now.
    """

    code = "KEY_RELEASE_REFUSED"
    hint = (
        "The rule and its reason are in `storaged doctor`, in the answer to the client (503) and in the audit log"
        " (key.refused). certificate validity: check the clock, or issue a new certificate (`storaged cluster issue`)"
        " and reload. cluster countries, cluster jurisdictions: this gateway is not certified inside the policy of the"
        " layout in force. bucket countries: use a gateway in one of the bucket's countries."
    )


class BucketKeyDamaged(Condition):
    """The ring's record of a bucket's key was removed or overwritten by something that is no gateway: a disk's damage,
    or an attack with a node's certificate.
    """

    code = "BUCKET_KEY_DAMAGED"
    hint = (
        "Mended: this gateway wrote it again from its own copy; find out who did it (audit log: key.restore). Not"
        " mended: no copy here opens. Other gateways mend it from theirs when they use the bucket; else restore the"
        " newest backup (`storaged keys restore FILE`, then reload the gateway). Until then the bucket's objects cannot"
        " be read."
    )


class ClockSkewed(Condition):
    """A node's clock differs from the gateway's by more than a few seconds."""

    code = "CLOCK_SKEWED"
    hint = "Run an NTP client. Safety does not depend on clocks; signatures and dates do."


# --- between nodes
# ------------------------------------------------------------------------------------------------------


class PeerError(StoragedError):
    """A peer did not do what was asked of it."""

    code = "PEER_ERROR"


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


class FragmentDamaged(PeerError):
    """The fragment's bytes do not match their checksum on the disk."""

    code = "FRAGMENT_DAMAGED"


class DiskUnusable(PeerError):
    """The disk cannot take this now (full, read-only, failed, unknown to the node)."""

    code = "DISK_UNUSABLE"


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
