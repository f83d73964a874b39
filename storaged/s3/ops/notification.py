"""Which events of a bucket go to which destination (PutBucketNotificationConfiguration).

Destinations are named by the operator of the gateways, never by address: no owner of a bucket makes the cluster call
what it should not call. A configuration that names another destination is refused.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketNotificationConfiguration.html
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Final

from storaged import errors
from storaged.objects.configuration.notification import NOTIFICATION, Notification, NotificationRule, covers
from storaged.objects.destinations import DeliveryFailed
from storaged.objects.event_document import trial_document
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import CONTROL, Reply, xml_reply
from storaged.s3.request import Request

RULES_MAX: Final = 100
ID_CHARS_MAX: Final = 255
FILTER_CHARS_MAX: Final = 1024
TRIAL_S: Final = 10.0

EVENTS: Final = frozenset(
    {
        "ObjectCreated:*", "ObjectCreated:Put", "ObjectCreated:Post", "ObjectCreated:Copy",
        "ObjectCreated:CompleteMultipartUpload", "ObjectRemoved:*", "ObjectRemoved:Delete",
        "ObjectRemoved:DeleteMarkerCreated", "LifecycleExpiration:*", "LifecycleExpiration:Delete",
        "LifecycleExpiration:DeleteMarkerCreated",
    }
)  # fmt: skip
OTHER_EVENTS: Final = frozenset(
    {
        "ReducedRedundancyLostObject", "ObjectRestore:*", "ObjectRestore:Post", "ObjectRestore:Completed",
        "ObjectRestore:Delete", "Replication:*", "Replication:OperationFailedReplication",
        "Replication:OperationNotTracked", "Replication:OperationMissedThreshold",
        "Replication:OperationReplicatedAfterThreshold", "LifecycleTransition", "IntelligentTiering",
        "ObjectAcl:Put", "ObjectTagging:*", "ObjectTagging:Put", "ObjectTagging:Delete",
    }
)  # fmt: skip
"""AWS's events that do not come here."""
_KINDS: Final = {
    "QueueConfiguration": "Queue",
    "TopicConfiguration": "Topic",
    "CloudFunctionConfiguration": "CloudFunction",
}


def parse(document: bytes) -> Notification:
    """Raises MalformedXML, InvalidArgument, NotImplemented."""
    root = xml.parse(document, "NotificationConfiguration")
    if len(root.children) > RULES_MAX:
        raise errors.InvalidArgument(f"A bucket has at most {RULES_MAX} notification configurations.")
    rules = []
    for number, node in enumerate(root.children):
        if node.name == "EventBridgeConfiguration":
            raise errors.NotImplemented("There is no EventBridge. Name a destination in a QueueConfiguration.")
        if node.name not in _KINDS:
            raise errors.MalformedXML()
        rules.append(_rule(node, number))
    if len({rule.id for rule in rules}) != len(rules):
        raise errors.InvalidArgument("Same ID used for multiple configurations. IDs must be unique")
    for first, second in itertools.combinations(rules, 2):
        if _overlap(first, second):
            raise errors.InvalidArgument(
                "Configurations overlap. Configurations on the same bucket cannot share a common event type."
            )
    return Notification(tuple(rules))


def _rule(node: xml.Node, number: int) -> NotificationRule:
    target = _KINDS[node.name]
    single = [child for child in node.children if child.name in ("Id", target)]
    events = [_event(child.text) for child in node.all("Event")]
    filters = node.all("Filter")
    if len({child.name for child in single}) != len(single) or len(filters) > 1:
        raise errors.MalformedXML()
    if len(single) + len(events) + len(filters) != len(node.children) or not events:
        raise errors.MalformedXML()
    fields = {child.name: child.text.strip() for child in single}
    if not fields.get(target) or len(fields.get("Id", "")) > ID_CHARS_MAX or CONTROL.search(fields.get("Id", "")):
        raise errors.MalformedXML()
    prefix, suffix = _filter(filters[0]) if filters else ("", "")
    return NotificationRule(
        fields.get("Id") or f"configuration-{number + 1}", fields[target], tuple(events), prefix, suffix
    )


def _event(text: str) -> str:
    name = text.strip().removeprefix("s3:")
    if name in OTHER_EVENTS and text.strip().startswith("s3:"):
        raise errors.NotImplemented(f"Events of the type {text.strip()} do not come here.")
    if name not in EVENTS or not text.strip().startswith("s3:"):
        raise errors.InvalidArgument(
            "A specified event is not supported for notifications.", ArgumentName="Event", ArgumentValue=text[:200]
        )
    return name


def _filter(node: xml.Node) -> tuple[str, str]:
    if [child.name for child in node.children] != ["S3Key"]:
        raise errors.MalformedXML()
    found: dict[str, str] = {}
    for rule in node.children[0].children:
        fields = rule.fields({"Name", "Value"}) if rule.name == "FilterRule" else {}
        name = fields.get("Name", "").strip().lower()
        if "Value" not in fields:
            raise errors.MalformedXML()
        if name not in ("prefix", "suffix"):
            raise errors.InvalidArgument(
                "filter rule name must be either prefix or suffix", ArgumentName="FilterRule.Name"
            )
        if name in found:
            raise errors.InvalidArgument(
                f"Cannot specify more than one {name} rule in a filter.", ArgumentName="FilterRule.Name"
            )
        if len(fields["Value"]) > FILTER_CHARS_MAX:
            raise errors.InvalidArgument(
                f"Size of filter rule value cannot exceed {FILTER_CHARS_MAX} bytes in UTF-8 representation",
                ArgumentName="FilterRule.Value",
            )
        found[name] = fields["Value"]
    return found.get("prefix", ""), found.get("suffix", "")


def _overlap(one: NotificationRule, other: NotificationRule) -> bool:
    """Whether one event of one key could be wanted by both."""
    prefixes = one.prefix.startswith(other.prefix) or other.prefix.startswith(one.prefix)
    suffixes = one.suffix.endswith(other.suffix) or other.suffix.endswith(one.suffix)
    events = any(covers(a, b) or covers(b, a) for a in one.events for b in other.events)
    return prefixes and suffixes and events


def show(value: Notification) -> bytes:
    return xml.document("NotificationConfiguration", *map(_shown, value.rules))


def _shown(rule: NotificationRule) -> str:
    filters = "".join(
        f"<FilterRule>{xml.element('Name', name)}{xml.element('Value', text)}</FilterRule>"
        for name, text in (("Prefix", rule.prefix), ("Suffix", rule.suffix))
        if text
    )
    return (
        f"<QueueConfiguration>{xml.element('Id', rule.id)}{xml.element('Queue', rule.destination)}"
        f"{''.join(xml.element('Event', f's3:{event}') for event in rule.events)}"
        f"{f'<Filter><S3Key>{filters}</S3Key></Filter>' if filters else ''}</QueueConfiguration>"
    )


async def get_notification(front: Front, request: Request) -> Reply:
    configuration = await front.buckets.configuration(request.bucket_record)
    return xml_reply(show(configuration.get(NOTIFICATION) or Notification()))


async def put_notification(front: Front, request: Request) -> Reply:
    if not request.document.strip():
        raise errors.MissingRequestBodyError()
    value = await parse_document(parse, request.document)
    skip = request.headers.get("x-amz-skip-destination-validation", "false").lower() == "true"
    await _check_destinations(front, request, sorted({rule.destination for rule in value.rules}), skip)
    await front.buckets.configure(request.bucket_record, NOTIFICATION, lambda _: value, who=request.who)
    return Reply()


async def _check_destinations(front: Front, request: Request, arns: Sequence[str], skip: bool) -> None:
    """Each must be known here and, unless ``skip``, take a test event. Raises InvalidArgument."""
    refused = {arn: "The destination does not exist" for arn in arns if not front.destinations.knows(arn)}
    trial = trial_document(request.bucket, request.id, front.clock.wall_ms())

    async def send(arn: str) -> None:
        try:
            async with asyncio.timeout(TRIAL_S):
                await front.destinations.send(arn, trial)
        except (DeliveryFailed, TimeoutError):
            refused[arn] = "The destination does not take the test event"

    if not refused and not skip:
        await asyncio.gather(*map(send, arns))
    if refused:
        arn, why = next(iter(sorted(refused.items())))
        raise errors.InvalidArgument(
            "Unable to validate the following destination configurations",
            ArgumentName1=arn[:200],
            ArgumentValue1=why,
        )
