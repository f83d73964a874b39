"""Makes deploy/S3.md, the table of every operation, header, parameter and element of S3 and of what this server does
with it::

    python -m tests.s3_table

Theory of operation. Botocore's model says what exists. What this server does is not written down a second time:
operations are looked up in ``s3.routes``; a header or parameter is shown to the operation's own check, and the error is
the answer. An element of a document counts as known when the front's code names it. Whatever is neither is in
``ELEMENTS`` or ``UNSENT`` below, with the reason. What is nowhere has no row, and ``tests/unit/test_s3_table.py``
fails: so after an update of botocore somebody decides about each new name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import botocore.loaders  # type: ignore[import-untyped]

from storaged.errors import S3Error
from storaged.objects.api import CHECKSUM_ALGORITHMS
from storaged.s3 import aws_names, routes
from storaged.s3.aws_names import CUSTOMER_KEY, META
from storaged.s3.headers import CHECKSUM_HEADERS
from storaged.s3.operation import Operation

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "deploy" / "S3.md"

OLD = {
    "GetBucketLifecycle": "GetBucketLifecycleConfiguration",
    "PutBucketLifecycle": "PutBucketLifecycleConfiguration",
    "GetBucketNotification": "GetBucketNotificationConfiguration",
    "PutBucketNotification": "PutBucketNotificationConfiguration",
}
"""Operations that AWS keeps for old clients: the same request as another."""

ELSEWHERE = {"WriteGetObjectResponse": "none"}
"""Operations that no request to this server can be."""

LISTS = {"ListObjectAnnotations": "GetObjectAnnotation"}
"""Operations whose requests differ from another's by an ``id`` that is missing, and the row that answers both."""

_NO_EVENT_HOLD = "event holds are not implemented"
_NO_REPLICATION = "replication is not implemented"
_DIRECTORY = "it is of directory buckets"
_RESTORED = "objects are never archived"

WHY = {
    "Abac": "attributes of buckets decide nothing here: policies with tags of requests and objects do",
    "Accelerate": "there are no edge locations",
    "Analytics": "data is kept in one way, so nothing to analyse",
    "Annotation": "annotations are not implemented",
    "DirectoryBuckets": "directory buckets are not here",
    "IntelligentTiering": "data is kept in one way",
    "Lifecycle": "AWS keeps it for old clients",
    "Metadata": "the tables of S3 Metadata are a service of AWS of their own",
    "Metrics": "they are for CloudWatch; the metrics of this server are in deploy/README.md",
    "Notification": "AWS keeps it for old clients",
    "Replication": "it is not implemented: one cluster spans all sites",
    "RequestPayment": "nobody pays for requests",
    "RestoreObject": _RESTORED,
    "SelectObjectContent": "AWS gives it to no new customer",
    "Session": "directory buckets are not here",
    "Torrent": "AWS gives it to no new bucket",
    "WriteGetObjectResponse": "irrelevant: it is a call to the hosts of Object Lambda",
}
"""Why an operation is not done: the first of these that is part of its name."""

ELEMENTS = {
    "EventHold": f"400 MalformedXML: {_NO_EVENT_HOLD}",
    "EventHoldDuration": f"400 MalformedXML: {_NO_EVENT_HOLD}",
    "DefaultEventHold": f"400 MalformedXML: {_NO_EVENT_HOLD}",
    "MFADelete": "501 NotImplemented when it is Enabled: MFA Delete is not implemented",
    "MfaDelete": "501 NotImplemented when it is Enabled: MFA Delete is not implemented",
    "Location": f"400 MalformedXML: {_DIRECTORY}",
    "Bucket": f"400 MalformedXML: {_DIRECTORY}",
    "TargetGrants": "501 NotImplemented when it names somebody: the policy of the target bucket gives access to logs",
    "EventBridgeConfiguration": "501 NotImplemented: there is no EventBridge",
    "DataRedundancy": f"400 MalformedXML: {_DIRECTORY}",
}
"""Elements of requests that the front's code does not name, and what becomes of them."""

TAKEN = {("PutBucketInventoryConfiguration", "Bucket")}
"""Elements that have the name of one of these in another operation."""

UNSENT = {
    "x-amz-request-charged": "no bucket makes its requesters pay",
    "DefaultEventHold": _NO_EVENT_HOLD,
    "EventHold": _NO_EVENT_HOLD,
    "EventHoldDuration": _NO_EVENT_HOLD,
    "x-amz-bucket-arn": _DIRECTORY,
    "BucketArn": _DIRECTORY,
    "IsRestoreInProgress": _RESTORED,
    "RestoreExpiryDate": _RESTORED,
    "x-amz-restore": _RESTORED,
    "x-amz-archive-status": _RESTORED,
    "x-amz-restore-output-path": _RESTORED,
    "x-amz-replication-status": _NO_REPLICATION,
    "x-amz-missing-meta": "it is for SOAP: metadata that HTTP can't carry is refused at the PUT",
    "x-amz-access-point-alias": "access points are not here",
    "x-amz-bucket-location-name": _DIRECTORY,
    "x-amz-bucket-location-type": _DIRECTORY,
    "x-amz-object-size": "it is the answer of an append, and there are no appends",
}
"""Headers and elements of answers that this server never sends, and why."""


class Member(NamedTuple):
    """One name in a request or an answer. ``where``: header, query, path or document. ``name``: as on the wire."""

    where: str
    name: str


WHERE = {"header": "header", "headers": "header", "querystring": "query", "uri": "path", "statusCode": "status"}


@cache
def model() -> dict[str, Any]:
    loaded: dict[str, Any] = botocore.loaders.Loader().load_service_model("s3", "service-2")
    return loaded


def members(operation: str, side: str) -> list[Member]:
    """Every name of a request (``side``: input) or an answer (output), each once, those of nested elements too."""
    shape = model()["operations"][operation].get(side, {}).get("shape")
    return list(dict.fromkeys(_walk(shape))) if shape else []


def _walk(name: str, above: tuple[str, ...] = ()) -> Iterator[Member]:
    shape = model()["shapes"][name]
    if name in above or shape.get("streaming"):
        return
    if shape["type"] == "list":
        yield from _walk(shape["member"]["shape"], above)
    for own, member in shape.get("members", {}).items():
        if member.get("streaming") or model()["shapes"][member["shape"]].get("streaming"):
            continue
        where = WHERE.get(member.get("location", ""), "document")
        yield Member(where, member.get("locationName", own))
        if where == "document":
            yield from _walk(member["shape"], (*above, name))


@cache
def operations() -> dict[str, Operation]:
    """The rows of ``routes`` by name."""
    found: dict[str, Operation] = {}
    for table in (routes.SERVICE, routes.BUCKET, routes.OBJECT):
        for methods in table.values():
            for operation in methods.values():
                for row in (operation, operation.copy, operation.unnamed):
                    if row is not None:
                        found[row.name] = row
    return found


@cache
def code() -> str:
    """The front's source, but for the tables of AWS's names."""
    folder = ROOT / "storaged" / "s3"
    return "".join(path.read_text() for path in sorted(folder.rglob("*.py")) if path.name != "aws_names.py")


BUILT = {
    *(f"Checksum{algorithm}" for algorithm in CHECKSUM_ALGORITHMS),
    *CHECKSUM_HEADERS,
    *(f"{CUSTOMER_KEY}{part}" for part in ("algorithm", "key", "key-md5")),
    META,
}
"""Names that the code makes of two."""


@cache
def named(name: str) -> bool:
    """Whether the front's code names an element or a header."""
    if name in BUILT or name.lower() in BUILT:
        return True
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", code(), re.IGNORECASE) is not None


class NoRow(Exception):
    """Nobody has decided what becomes of a name."""


def answer_to(operation: Operation, member: Member) -> str:
    """What becomes of a name in a request; empty: it is honoured. Raises NoRow."""
    lower = member.name.lower()
    if member.where == "path":
        return ""
    if member.where == "document":
        if member.name in ELEMENTS and (operation.name, member.name) not in TAKEN:
            return ELEMENTS[member.name]
        if named(member.name):
            return ""
        raise NoRow(f"{operation.name}: the element {member.name}")
    if member.where == "query":
        if member.name in operation.parameters:
            return ""
        raise NoRow(f"{operation.name}: the parameter {member.name}")
    row = aws_names.HEADERS.get(lower)
    if lower in operation.headers:
        return row.note if row is not None else ""
    if lower == META and operation.name in aws_names.METADATA:
        return ""
    try:
        operation.check_headers({lower: "1"})
    except S3Error as error:
        return f"{error.status} {error.code}: {error.message}"
    raise NoRow(f"{operation.name}: the header {member.name}")


def unsent(operation: str, member: Member) -> str:
    """Why a name of an answer is never sent; empty: it is. Raises NoRow."""
    asked = aws_names.HEADERS.get(member.name.lower())
    if asked is not None and asked.refusal and member.name.startswith("x-amz-"):
        return asked.refusal
    if member.where == "status" or named(member.name):
        return ""
    if member.name in UNSENT:
        return UNSENT[member.name]
    raise NoRow(f"{operation}: {member.where} {member.name} of the answer")


def why(operation: str) -> str:
    """Raises NoRow."""
    for part, reason in WHY.items():
        if part in operation:
            return reason
    raise NoRow(f"{operation}: why it is not done")


def without_row() -> list[str]:
    """What ``NoRow`` says of each name that has no row."""
    found = []
    for name in sorted(model()["operations"]):
        operation = operations().get(OLD.get(name, LISTS.get(name, name)))
        if operation is None:
            if name not in ELSEWHERE:
                found.append(f"the operation {name}")
        elif operation.answer:
            if not any(part in name for part in WHY):
                found.append(f"{name}: why it is not done")
        elif name not in OLD:
            for side in ("input", "output"):
                for member in members(name, side):
                    try:
                        answer_to(operation, member) if side == "input" else unsent(name, member)
                    except NoRow as missing:
                        found.append(str(missing))
    return found


# --- printing


INTRODUCTION = """\
# What of S3 is here

`python -m tests.s3_table` makes this page from botocore's model of S3 and from the server's own tables; a test fails
when it is not what the command makes. README.md, "Limits", has what is not a matter of names.

An operation, header, parameter or element that is not done is refused with the answer that is named here, and then
nothing is changed. A read ignores parameters that AWS does not document, as AWS does; a change refuses them when they
look like AWS's. Requests that only read ignore headers that are of other operations.
"""


RENAME = """
## RenameObject

On AWS it is of directory buckets, and atomic. Here every bucket has it that never had versioning; where versioning was
enabled, it answers 501. `x-amz-rename-source` is the key of the object, percent-encoded, or `/BUCKET/KEY` with the
bucket of the request. The sender needs `s3:GetObject` and `s3:DeleteObject` for the old key, and `s3:PutObject` for the
new one; if the object has tags, also `s3:GetObjectTagging` for the old key and `s3:PutObjectTagging` for the new one.
The object keeps its metadata, tags, owner, access control list, ETag, checksums and last modified time. Objects with
SSE-C are refused (400).

* When the answer is 200, the object has its new name and no other.
* It gets the new name at one moment: from then on GET, HEAD and copies find it there, and no more under the old name.
  It is never without a name. Lists, and conditions of writes to the old name, may see the old name until it is removed
  right after. If the gateway dies there, it stays until it is removed by a retry with the same client token, by another
  rename of the object a minute later, or by the next hourly walk that finds the rename ten minutes old. Until then a
  change of tags, access control list or encryption under the old name may answer 503. An object that is replaced,
  deleted or renamed under its new name meanwhile does not come back under the old one.
* Of several renames of an object at the same time one succeeds. The others answer 404 or 503, and change nothing.
* A rename changes nothing of what another request has put under the old name meanwhile. When a request overwrites or
  deletes the object under its old name during the rename, the object may still appear under its new name.
* After an error 5xx the rename may have been done: retry with the same token. The token is remembered as long as the
  object stays under its new name. With another source it answers 400 IdempotencyParameterMismatch.
* Coded objects, also those that were uploaded in parts, move no data. Others are read and sealed anew, if they have at
  most 5 GiB: small ones, and those whose record has too many borrowers or a replica that is away. The answer comes when
  that is done; unlike CopyObject, RenameObject sends no white space meanwhile. An object in parts that is sealed anew
  keeps its ETag and checksums, and has one part afterwards.
* Events: `ObjectCreated:Copy` of the new key, `ObjectRemoved:Delete` of the old one. Access logs have a line for each,
  with one request id: `REST.PUT.RENAME_OBJECT` for the new key, `BATCH.DELETE.OBJECT` for the old one.
"""


def document() -> str:
    done = [name for name in sorted(model()["operations"]) if _answer(name) == ""]
    other = [name for name in sorted(model()["operations"]) if _answer(name) != ""]
    lines = [INTRODUCTION]
    lines += ["## Operations that are done", "", "| operation | taken | refused, or without effect |", "|---|---|---|"]
    for name in done:
        taken, refused = _cells(name)
        lines.append(f"| {name} | {taken} | {refused} |")
    lines += ["", "## Operations that are not", "", "| operation | answer | why |", "|---|---|---|"]
    lines += [f"| {name} | {_answer(name)} | {why(name)} |" for name in other]
    lines += ["", "## What answers do not have", "", "| name | where | why |", "|---|---|---|"]
    lines += [f"| {name} | {_joined(where)} | {reason} |" for (name, reason), where in sorted(_unsent(done).items())]
    return "\n".join(lines) + "\n" + RENAME


def _answer(name: str) -> str:
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if name in OLD:
        return f"the same request as {OLD[name]}"
    return operations()[LISTS.get(name, name)].answer


def _cells(name: str) -> tuple[str, str]:
    taken: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for member in sorted(members(name, "input")):
        answer = answer_to(operations()[name], member)
        if not answer:
            taken.setdefault(member.where, []).append(member.name)
        else:
            refused.setdefault(answer, []).append(member.name)
    parts = [f"{where}: {_joined(names)}" for where, names in sorted(taken.items())]
    return "; ".join(parts), "; ".join(f"{_joined(names)}: {answer}" for answer, names in sorted(refused.items()))


def _joined(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _unsent(done: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """By name and reason: the operations whose answer lacks it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in done:
        for member in members(name, "output"):
            if reason := unsent(name, member):
                found.setdefault((member.name, reason), []).append(name)
    return found


if __name__ == "__main__":
    DOCUMENT.write_text(document())
