"""Documents of S3 in XML: any XML, and every kind of request document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from storaged.errors import S3Error
from storaged.objects.code.lifecycle import Subject, current_due, rules_of
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.lifecycle import LIFECYCLE, Lifecycle
from storaged.objects.configuration.website import Website
from storaged.s3 import cors as applied_cors
from storaged.s3 import website as applied_website
from storaged.s3 import xml
from storaged.s3.ops import (
    access,
    acl,
    bucket_logging,
    cors,
    encryption_settings,
    lifecycle,
    lock,
    multipart,
    notification,
    tags,
    versioning,
    website,
)
from storaged.s3.request import Request
from storaged.wire import Message, decode, encode
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, refused

ROOTS = ("Delete", "Tagging", "LifecycleConfiguration", "a")


def any_xml(data: bytes) -> None:
    """The standard library's parser takes every document that ours takes, and reads the same tree. Nothing is expanded:
    a tree has no more text than its document. A tree that is written again reads the same."""
    choices = Choices(data)
    root, document = choices.pick(ROOTS), choices.rest()
    found = refused(lambda: xml.parse(document, root))
    if isinstance(found, S3Error):
        return
    _same(found, ElementTree.fromstring(document))
    assert _text_size(found) <= len(document)
    again = xml.parse(xml.document(root, "".join(map(_written, found.children)) or xml.escape(found.text)), root)
    _same(again, ElementTree.fromstring(document), namespace=False)


def _same(node: xml.Node, other: Element, namespace: bool = True) -> None:
    assert node.name == other.tag.rpartition("}")[2]
    assert len(node.children) == len(other)
    if not node.children:
        assert node.text == (other.text or "")
    if namespace:
        assert len(node.attributes) == len(other.attrib)
        assert list(node.attributes.values()) == list(other.attrib.values())
    for one, its in zip(node.children, other, strict=True):
        _same(one, its, namespace)


def _written(node: xml.Node) -> str:
    return f"<{node.name}>{''.join(map(_written, node.children)) or xml.escape(node.text)}</{node.name}>"


def _text_size(node: xml.Node) -> int:
    return len(node.text.encode()) + sum(map(_text_size, node.children))


class Kind(NamedTuple):
    """``parse``: a document to its value. ``show``: the value as a read returns it; None: no read does."""

    parse: Callable[[bytes], Any]
    show: Callable[[Any], bytes] | None
    example: bytes


def _of_encryption(document: bytes) -> Any:
    return encryption_settings.parse_default(document)[0]


def _of_lifecycle(document: bytes) -> Lifecycle:
    return lifecycle.parse(document)[0]


KINDS = (
    Kind(
        lambda document: tags.tags_from(document, 50),
        tags.write_tagging,
        b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>",
    ),
    Kind(
        acl._parse,
        None,
        b"<AccessControlPolicy><Owner><ID>a</ID></Owner><AccessControlList><Grant><Grantee"
        b' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:type="CanonicalUser"><ID>a</ID></Grantee>'
        b"<Permission>READ</Permission></Grant></AccessControlList></AccessControlPolicy>",
    ),
    Kind(
        cors.parse,
        cors.show,
        b"<CORSConfiguration><CORSRule><ID>x</ID><AllowedOrigin>http://*.eu</AllowedOrigin><AllowedMethod>GET"
        b"</AllowedMethod><AllowedHeader>x-*</AllowedHeader><ExposeHeader>etag</ExposeHeader><MaxAgeSeconds>5"
        b"</MaxAgeSeconds></CORSRule></CORSConfiguration>",
    ),
    Kind(
        _of_lifecycle,
        lifecycle.show,
        b"<LifecycleConfiguration><Rule><ID>x</ID><Status>Enabled</Status><Filter><And><Prefix>a</Prefix><Tag><Key>k"
        b"</Key><Value>v</Value></Tag><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan></And></Filter><Expiration><Days>"
        b"5</Days></Expiration><NoncurrentVersionExpiration><NoncurrentDays>3</NoncurrentDays>"
        b"<NewerNoncurrentVersions>2</NewerNoncurrentVersions></NoncurrentVersionExpiration></Rule><Rule><Status>"
        b"Disabled</Status><Filter><ObjectSizeLessThan>9</ObjectSizeLessThan></Filter><Expiration><Date>"
        b"2030-01-01T00:00:00Z</Date></Expiration></Rule><Rule><Status>Enabled</Status><Filter/>"
        b"<AbortIncompleteMultipartUpload><DaysAfterInitiation>7</DaysAfterInitiation></AbortIncompleteMultipartUpload>"
        b"<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration></Rule>"
        b"</LifecycleConfiguration>",
    ),
    Kind(
        website.parse,
        website.show,
        b"<WebsiteConfiguration><IndexDocument><Suffix>i.html</Suffix></IndexDocument><ErrorDocument><Key>e</Key>"
        b"</ErrorDocument><RoutingRules><RoutingRule><Condition><KeyPrefixEquals>a</KeyPrefixEquals>"
        b"<HttpErrorCodeReturnedEquals>404</HttpErrorCodeReturnedEquals></Condition><Redirect><Protocol>https"
        b"</Protocol><HostName>h</HostName><ReplaceKeyPrefixWith>b</ReplaceKeyPrefixWith><HttpRedirectCode>302"
        b"</HttpRedirectCode></Redirect></RoutingRule></RoutingRules></WebsiteConfiguration>",
    ),
    Kind(
        _of_encryption,
        encryption_settings.show_default,
        b"<ServerSideEncryptionConfiguration><Rule><ApplyServerSideEncryptionByDefault><SSEAlgorithm>aws:kms"
        b"</SSEAlgorithm><KMSMasterKeyID>k</KMSMasterKeyID></ApplyServerSideEncryptionByDefault><BucketKeyEnabled>true"
        b"</BucketKeyEnabled><BlockedEncryptionTypes><EncryptionType>SSE-C</EncryptionType></BlockedEncryptionTypes>"
        b"</Rule></ServerSideEncryptionConfiguration>",
    ),
    Kind(
        access.BLOCK.parse,
        access.BLOCK.show,
        b"<PublicAccessBlockConfiguration><BlockPublicAcls>true</BlockPublicAcls><IgnorePublicAcls>FALSE"
        b"</IgnorePublicAcls></PublicAccessBlockConfiguration>",
    ),
    Kind(
        access.CONTROLS.parse,
        access.CONTROLS.show,
        b"<OwnershipControls><Rule><ObjectOwnership>ObjectWriter</ObjectOwnership></Rule></OwnershipControls>",
    ),
    Kind(
        lock.BUCKET_LOCK.parse,
        lock.BUCKET_LOCK.show,
        b"<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention><Mode>"
        b"GOVERNANCE</Mode><Days>5</Days></DefaultRetention></Rule></ObjectLockConfiguration>",
    ),
    Kind(
        bucket_logging.parse,
        bucket_logging.show,
        b"<BucketLoggingStatus><LoggingEnabled><TargetBucket>b</TargetBucket><TargetPrefix>p</TargetPrefix>"
        b"<TargetObjectKeyFormat><PartitionedPrefix><PartitionDateSource>EventTime</PartitionDateSource>"
        b"</PartitionedPrefix></TargetObjectKeyFormat></LoggingEnabled></BucketLoggingStatus>",
    ),
    Kind(
        notification.parse,
        notification.show,
        b"<NotificationConfiguration><QueueConfiguration><Id>i</Id><Queue>arn:aws:sqs:::q</Queue><Event>"
        b"s3:ObjectCreated:*</Event><Event>s3:ObjectRemoved:Delete</Event><Filter><S3Key><FilterRule><Name>prefix"
        b"</Name><Value>a</Value></FilterRule></S3Key></Filter></QueueConfiguration></NotificationConfiguration>",
    ),
    Kind(
        versioning._status_in,
        None,
        b"<VersioningConfiguration><Status>Enabled</Status><MfaDelete>Disabled</MfaDelete></VersioningConfiguration>",
    ),
    Kind(
        lock._retention,
        lambda value: xml.iso_time(value[1]).encode(),
        b"<Retention><Mode>COMPLIANCE</Mode><RetainUntilDate>2030-01-01T00:00:00Z</RetainUntilDate></Retention>",
    ),
    Kind(lock._hold, None, b"<LegalHold><Status>ON</Status></LegalHold>"),
    Kind(
        multipart._completed_parts,
        None,
        b'<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>"a"</ETag><ChecksumCRC32>AAAAAA=='
        b"</ChecksumCRC32></Part><Part><PartNumber>2</PartNumber><ETag>b</ETag></Part></CompleteMultipartUpload>",
    ),
    Kind(
        encryption_settings._parse_object_encryption,
        None,
        b"<ObjectEncryption><SSE-KMS><KMSKeyArn>arn:x</KMSKeyArn><BucketKeyEnabled>true</BucketKeyEnabled></SSE-KMS>"
        b"</ObjectEncryption>",
    ),
)


def document(data: bytes) -> None:
    """Each document gives a value, or an error of AWS's. A value is stored and read again as it was. It is shown
    as well-formed XML, from which the same value comes; a list of parts is in order. Rules answer for any request."""
    choices = Choices(data)
    kind, text = choices.pick(KINDS), choices.rest()
    value = refused(lambda: kind.parse(text))
    if isinstance(value, S3Error) or value is None:
        return
    if isinstance(value, Message):
        assert decode(encode(value), type(value)) == value
    if kind.parse is multipart._completed_parts:
        numbers = [part.number for part in value]
        assert numbers == sorted(set(numbers))
        assert 1 <= numbers[0] <= numbers[-1] <= 10_000
    if kind.show is not None:
        shown = kind.show(value)
        if shown.startswith(b"<"):
            ElementTree.fromstring(shown)
            assert kind.parse(shown) == value, "what a read returns means something else"
    _asked(value)


def _asked(value: Any) -> None:
    """The rules answer."""
    if isinstance(value, Lifecycle):
        rules = NOTHING.having(LIFECYCLE, value).derive(rules_of)
        for subject in (Subject(b"a/b", 7, 1_700_000_000_000, lambda: {"k": "v"}), Subject(b"", 0, 0, dict)):
            current_due(rules, subject)
    elif isinstance(value, Website):
        request = Request("1", "GET", b"/a", "", False, {"host": "h"})
        for error in (0, 404):
            rule = applied_website.matching(value.rules, b"a\xc3\xa9", error)
            if rule is not None:
                found = applied_website.location(rule, b"a\xc3\xa9", request)
                assert "\r" not in found
                assert "\n" not in found
                assert found.isascii()
    elif hasattr(value, "rules") and hasattr(value, "rules") and value.rules and hasattr(value.rules[0], "origins"):
        rule = applied_cors.matching(value.rules, "http://a.eu", "GET", ("x-a",))
        if rule is not None:
            for text in applied_cors._allowed(rule, "http://a.eu").values():
                assert not any(ord(letter) < 32 or ord(letter) == 127 for letter in text)


_ELEMENTS = sorted({word for kind in KINDS for word in kind.example.replace(b">", b"<").split(b"<") if word})
_XML = (
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    b"&b;",
    b"&amp;",
    b"&#x0;",
    b"&#65;",
    b"<![CDATA[x]]>",
    b"<!-- c -->",
    b"<?p i?>",
    b'<?xml version="1.0" encoding="UTF-8"?>',
    b'<?xml version="1.0" encoding="utf-16"?>',
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"',
    b' xmlns:a="x"',
    b"<a:b/>",
    b"</a>",
    b"<a>" * 17,
)

TARGETS = (
    Target(
        "xml",
        any_xml,
        (
            b"\x03<a><b>x</b><c d='e'/></a>",
            b'\x01<?xml version="1.0"?><Tagging xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><TagSet/></Tagging>',
            b"\x03<a>x<!-- c -->y&amp;&#65;<![CDATA[z]]></a>",
        ),
        Plant(xml._Builder, "end", lambda _: lambda self, name: self._open.pop()),
        _XML,
    ),
    Target(
        "document",
        document,
        tuple(bytes((number,)) + kind.example for number, kind in enumerate(KINDS)),
        Plant(lifecycle, "_shown_noncurrent", lambda _: lambda rule: ""),
        (*_XML, *(b"<%b>" % word for word in _ELEMENTS), *(b"</%b>" % word for word in _ELEMENTS), *_ELEMENTS),
        steps_a_byte=60,
    ),
)
