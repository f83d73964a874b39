"""The lifecycle configuration of a bucket: rules by which its objects expire.

Every refusal has the code that AWS sends, and changes nothing. There are no storage classes but STANDARD here, so rules
with transitions are refused: a rule is never stored and ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from msgspec.structs import replace

from storaged import errors
from storaged.objects.configuration.document import Configuration
from storaged.objects.configuration.lifecycle import AND, LIFECYCLE, OLD, ONE, Lifecycle, LifecycleFilter, LifecycleRule
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.conditions import parse_time
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import Headers, Reply, xml_reply
from storaged.s3.request import Request
from storaged.wire import encode

RULES_MAX = 1000
ID_CHARS_MAX = 255
PREFIX_BYTES_MAX = 1024
DAYS_MAX = 2**31 - 1
SIZE_MAX = 2**63 - 1
NEWER_MAX = 100
DAY_MS = 86_400_000

MINIMUM = "x-amz-transition-default-minimum-object-size"
_MINIMA = ("all_storage_classes_128K", "varies_by_storage_class")

_TRANSITIONS = frozenset({"Transition", "NoncurrentVersionTransition"})
_RULE = frozenset(
    {
        "ID", "Status", "Prefix", "Filter", "Expiration", "NoncurrentVersionExpiration",
        "AbortIncompleteMultipartUpload", *_TRANSITIONS,
    }
)  # fmt: skip
_CONDITIONS = frozenset({"Prefix", "Tag", "ObjectSizeGreaterThan", "ObjectSizeLessThan", "And"})


# --- parsing


def parse(document: bytes) -> tuple[Lifecycle, bool]:
    """The rules, and whether each filter has one condition, or ``And``, as AWS wants it. Raises MalformedXML,
    InvalidRequest, InvalidArgument, InvalidStorageClass."""
    nodes = xml.parse(document, "LifecycleConfiguration").children
    if not nodes or any(node.name != "Rule" for node in nodes):
        raise errors.MalformedXML()
    if len(nodes) > RULES_MAX:
        raise errors.InvalidRequest(
            f"The number of lifecycle rules must not exceed the allowed limit of {RULES_MAX} rules."
        )
    strict = all(len(found.children) <= 1 for node in nodes for found in node.all("Filter"))
    rules = [_named(_rule(node), number) for number, node in enumerate(nodes)]
    if len({rule.id for rule in rules}) != len(rules):
        raise errors.InvalidArgument("Rule ID must be unique. Found same ID for more than one rule")
    if len({rule.filter.form == OLD for rule in rules}) > 1:
        raise errors.InvalidRequest(
            "Base level prefix cannot be used in Lifecycle V2, prefixes are only supported in the Filter."
        )
    return Lifecycle(tuple(rules)), strict


def _named(rule: LifecycleRule, number: int) -> LifecycleRule:
    """A rule without an ID gets one, always the same for the same document."""
    if rule.id:
        return rule
    return replace(rule, id=hashlib.sha256(b"%d " % number + encode(rule)).hexdigest()[:32])


def _rule(node: xml.Node) -> LifecycleRule:
    names = [child.name for child in node.children]
    once = [name for name in names if name not in _TRANSITIONS]
    if not _RULE.issuperset(names) or len(once) != len(set(once)):
        raise errors.MalformedXML()
    found = {child.name: child for child in node.children}
    rule_id, status = _text(found.get("ID")), _text(found.get("Status")).strip()
    if len(rule_id) > ID_CHARS_MAX:
        raise errors.InvalidArgument(f"ID length should not exceed allowed limit of {ID_CHARS_MAX}")
    if status not in ("Enabled", "Disabled"):
        raise errors.MalformedXML()
    rule = LifecycleRule(rule_id, status == "Enabled", _filter(found.get("Prefix"), found.get("Filter")))
    if _TRANSITIONS.intersection(names):
        raise _no_transitions([child for child in node.children if child.name in _TRANSITIONS])
    if "Expiration" in found:
        rule = _with_expiration(rule, found["Expiration"])
    if "NoncurrentVersionExpiration" in found:
        rule = _with_noncurrent(rule, found["NoncurrentVersionExpiration"])
    if "AbortIncompleteMultipartUpload" in found:
        fields = found["AbortIncompleteMultipartUpload"].fields({"DaysAfterInitiation"})
        what = "'DaysAfterInitiation' for AbortIncompleteMultipartUpload action"
        rule = replace(rule, abort_days=_days(fields.get("DaysAfterInitiation"), what))
    _check_actions(rule)
    return rule


def _text(node: xml.Node | None) -> str:
    """Raises MalformedXML for an element with children."""
    if node is None:
        return ""
    if node.children:
        raise errors.MalformedXML()
    return node.text


def _check_actions(rule: LifecycleRule) -> None:
    if not (rule.days or rule.date_ms or rule.marker or rule.marker_stays or rule.noncurrent_days or rule.abort_days):
        raise errors.InvalidRequest("At least one action needs to be specified in a rule.")
    wanted = rule.filter
    sized = wanted.larger_than is not None or wanted.smaller_than is not None
    for used, name in ((rule.abort_days, "AbortIncompleteMultipartUpload"), (rule.marker, "ExpiredObjectDeleteMarker")):
        if used and wanted.tags:
            raise errors.InvalidRequest(f"{name} cannot be specified with Tags.")
        if used and sized:
            raise errors.InvalidRequest(f"{name} cannot be specified with Object Size.")
    if rule.newer_noncurrent and wanted.form == OLD:
        raise errors.InvalidRequest("NewerNoncurrentVersions can only be used in a rule with a Filter.")


def _no_transitions(nodes: Sequence[xml.Node]) -> errors.S3Error:
    """No class can be the target of a transition."""
    for node in nodes:
        fields = node.fields({"Date", "Days", "StorageClass", "NoncurrentDays", "NewerNoncurrentVersions"})
        if "StorageClass" not in fields:
            return errors.MalformedXML()
        if "Date" in fields:
            _date(fields["Date"])
    return errors.InvalidStorageClass()


def _number(text: str, low: int, high: int) -> int | None:
    """None outside of the bounds. Raises MalformedXML for what is no whole number."""
    text = text.strip()
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise errors.MalformedXML()
    return int(text) if low <= int(text) <= high else None


def _days(text: str | None, what: str) -> int:
    if text is None:
        raise errors.MalformedXML()
    found = _number(text, 1, DAYS_MAX)
    if found is None:
        raise errors.InvalidArgument(f"{what} must be a positive integer")
    return found


def _date(text: str) -> int:
    found = parse_time(text.strip())
    if found is None:
        raise errors.MalformedXML()
    if found % DAY_MS or found <= 0:
        raise errors.InvalidArgument("'Date' must be at midnight GMT")
    return found


def _with_expiration(rule: LifecycleRule, node: xml.Node) -> LifecycleRule:
    fields = node.fields({"Days", "Date", "ExpiredObjectDeleteMarker"})
    if len(fields) != 1:
        raise errors.MalformedXML()
    if "Days" in fields:
        return replace(rule, days=_days(fields["Days"], "'Days' for Expiration action"))
    if "Date" in fields:
        return replace(rule, date_ms=_date(fields["Date"]))
    marker = fields["ExpiredObjectDeleteMarker"].strip()
    if marker not in ("true", "false"):
        raise errors.MalformedXML()
    return replace(rule, marker=marker == "true", marker_stays=marker == "false")


def _with_noncurrent(rule: LifecycleRule, node: xml.Node) -> LifecycleRule:
    fields = node.fields({"NoncurrentDays", "NewerNoncurrentVersions"})
    days = _days(fields.get("NoncurrentDays"), "'NoncurrentDays' for NoncurrentVersionExpiration action")
    newer = 0
    if "NewerNoncurrentVersions" in fields:
        found = _number(fields["NewerNoncurrentVersions"], 1, NEWER_MAX)
        if found is None:
            raise errors.InvalidArgument(
                "'NewerNoncurrentVersions' for NoncurrentVersionExpiration action must be a positive integer, at most"
                f" {NEWER_MAX}"
            )
        newer = found
    return replace(rule, noncurrent_days=days, newer_noncurrent=newer)


def _filter(prefix: xml.Node | None, node: xml.Node | None) -> LifecycleFilter:
    """Of a rule, which has either of them."""
    if prefix is not None and node is not None:
        raise errors.InvalidRequest(
            "Base level prefix cannot be used in Lifecycle V2, prefixes are only supported in the Filter."
        )
    if node is None:
        if prefix is None:
            raise errors.MalformedXML()
        return LifecycleFilter(_prefix(_text(prefix)), form=OLD)
    joined = [child for child in node.children if child.name != "And"]
    for inner in node.all("And"):
        if len(inner.children) < 2:
            raise errors.MalformedXML()
        joined += inner.children
    return _conditions(joined, AND if len(joined) > 1 else ONE, _CONDITIONS.issuperset(one.name for one in joined))


def _conditions(nodes: Sequence[xml.Node], form: str, known: bool) -> LifecycleFilter:
    """All of them must hold."""
    prefixes = [_prefix(_text(node)) for node in nodes if node.name == "Prefix"]
    # the suite of Ceph writes a prefix beside ``And`` with another one: the longer one says both
    prefix = max(prefixes, key=len, default="")
    sizes = {node.name: _size(_text(node)) for node in nodes if node.name.startswith("ObjectSize")}
    counted = [node.name for node in nodes if node.name not in ("Prefix", "Tag")]
    if not known or len(counted) != len(set(counted)) or not all(prefix.startswith(one) for one in prefixes):
        raise errors.MalformedXML()
    larger, smaller = sizes.get("ObjectSizeGreaterThan"), sizes.get("ObjectSizeLessThan")
    if larger is not None and smaller is not None and smaller <= larger:
        raise errors.InvalidRequest("'ObjectSizeLessThan' has to be a value greater than 'ObjectSizeGreaterThan'.")
    return LifecycleFilter(prefix, _tags(nodes), larger, smaller, form, empty_prefix=bool(prefixes) and not prefix)


def _prefix(text: str) -> str:
    if len(text.encode()) > PREFIX_BYTES_MAX:
        raise errors.InvalidRequest(f"The maximum size of a prefix is {PREFIX_BYTES_MAX}.")
    return text


def _size(text: str) -> int:
    found = _number(text, 0, SIZE_MAX)
    if found is None:
        raise errors.InvalidRequest(f"Object sizes in a filter are from 0 to {SIZE_MAX}.")
    return found


def _tags(nodes: Sequence[xml.Node]) -> dict[str, str]:
    pairs = []
    for node in nodes:
        if node.name == "Tag":
            fields = node.fields({"Key", "Value"})
            if len(fields) != 2:
                raise errors.MalformedXML()
            pairs.append((fields["Key"], fields["Value"]))
    if len({key for key, _ in pairs}) != len(pairs):
        raise errors.InvalidRequest("Duplicate Tag Keys are not allowed.")
    return h.check_tags(pairs, h.TAGS_PER_OBJECT_MAX)


# --- printing


def show(value: Lifecycle) -> bytes:
    return xml.document("LifecycleConfiguration", "".join(map(_shown, value.rules)))


def _shown(rule: LifecycleRule) -> str:
    return "".join(
        (
            "<Rule>",
            xml.element("ID", rule.id),
            _shown_filter(rule.filter),
            xml.element("Status", "Enabled" if rule.enabled else "Disabled"),
            _shown_expiration(rule),
            _shown_noncurrent(rule),
            f"<AbortIncompleteMultipartUpload>{xml.element('DaysAfterInitiation', rule.abort_days)}"
            "</AbortIncompleteMultipartUpload>"
            if rule.abort_days
            else "",
            "</Rule>",
        )
    )


def _shown_expiration(rule: LifecycleRule) -> str:
    if rule.days:
        return f"<Expiration>{xml.element('Days', rule.days)}</Expiration>"
    if rule.date_ms:
        return f"<Expiration>{xml.element('Date', xml.iso_time(rule.date_ms))}</Expiration>"
    if rule.marker or rule.marker_stays:
        return f"<Expiration>{xml.boolean('ExpiredObjectDeleteMarker', rule.marker)}</Expiration>"
    return ""


def _shown_noncurrent(rule: LifecycleRule) -> str:
    if not rule.noncurrent_days:
        return ""
    newer = xml.element("NewerNoncurrentVersions", rule.newer_noncurrent) if rule.newer_noncurrent else ""
    days = xml.element("NoncurrentDays", rule.noncurrent_days)
    return f"<NoncurrentVersionExpiration>{days}{newer}</NoncurrentVersionExpiration>"


def _shown_filter(wanted: LifecycleFilter) -> str:
    if wanted.form == OLD:
        return xml.element("Prefix", wanted.prefix)
    conditions = xml.element("Prefix", wanted.prefix) if wanted.prefix or wanted.empty_prefix else ""
    for name, value in wanted.tags.items():
        conditions += f"<Tag>{xml.element('Key', name)}{xml.element('Value', value)}</Tag>"
    if wanted.larger_than is not None:
        conditions += xml.element("ObjectSizeGreaterThan", wanted.larger_than)
    if wanted.smaller_than is not None:
        conditions += xml.element("ObjectSizeLessThan", wanted.smaller_than)
    return f"<Filter>{f'<And>{conditions}</And>' if wanted.form == AND else conditions}</Filter>"


# --- operations


async def put_lifecycle(front: Front, request: Request) -> Reply:
    """Answers when all gateways know the rules: no version expires by others that begins to after that."""
    if not request.document.strip():
        raise errors.MissingRequestBodyError()
    minimum = request.headers.get(MINIMUM, _MINIMA[0])
    if minimum not in _MINIMA:
        raise errors.InvalidRequest(f"The {MINIMUM} is one of: {', '.join(_MINIMA)}.")
    value, strict = await parse_document(parse, request.document)
    if not strict and not front.endpoint.legacy_buckets:
        raise errors.MalformedXML("A Filter has exactly one condition, or And.")
    await _configure(front, request, replace(value, transition_minimum=minimum))
    return Reply(headers={MINIMUM: minimum})


async def _configure(front: Front, request: Request, value: Lifecycle | None) -> None:
    changed = False

    def change(before: Configuration) -> Lifecycle | None:
        nonlocal changed
        changed = before.get(LIFECYCLE) != value
        return value

    await front.buckets.configure(request.bucket_record, LIFECYCLE, change, who=request.who)
    if changed:
        await front.buckets.known_everywhere()


async def get_lifecycle(front: Front, request: Request) -> Reply:
    found = (await front.buckets.configuration(request.bucket_record)).get(LIFECYCLE)
    if found is None:
        raise errors.NoSuchLifecycleConfiguration(BucketName=request.bucket)
    headers: Headers = {MINIMUM: found.transition_minimum or _MINIMA[0]}
    return xml_reply(show(found), headers=headers)


async def delete_lifecycle(front: Front, request: Request) -> Reply:
    """As ``put_lifecycle``: afterwards nothing begins to expire."""
    await _configure(front, request, None)
    return Reply(204)
