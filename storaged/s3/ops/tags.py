"""Tagging documents of buckets and objects, and the tags of a bucket."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from storaged.errors import InvalidRequest, MalformedXML, NoSuchTagSet
from storaged.objects.configuration import kinds
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.documents import parse_document
from storaged.s3.ops.configuration import Row
from storaged.s3.request import Request


async def read_tagging(request: Request, count_max: int) -> dict[str, str]:
    """The tags in the request's document. Raises MalformedXML, InvalidTag, InvalidRequest."""
    if "content-length" in request.headers and request.body.length == 0:
        raise InvalidRequest("The request is missing its body.")
    return await parse_document(partial(tags_from, count_max=count_max), request.document)


def tags_from(document: bytes, count_max: int) -> dict[str, str]:
    """Raises MalformedXML, InvalidTag."""
    root = xml.parse(document, "Tagging")
    if len(root.children) != 1 or root.children[0].name != "TagSet":
        raise MalformedXML()
    return tags_in(root.children[0], count_max)


def tags_in(tag_set: xml.Node, count_max: int) -> dict[str, str]:
    """Raises MalformedXML, InvalidTag."""
    pairs = []
    for tag in tag_set.children:
        found = tag.fields({"Key", "Value"})
        if tag.name != "Tag" or len(found) != 2:
            raise MalformedXML()
        pairs.append((found["Key"], found["Value"]))
    return h.check_tags(pairs, count_max)


def write_tagging(tags: Mapping[str, str]) -> bytes:
    rows = "".join(
        f"<Tag>{xml.element('Key', name)}{xml.element('Value', value)}</Tag>" for name, value in sorted(tags.items())
    )
    return xml.document("Tagging", f"<TagSet>{rows}</TagSet>")


def _bucket_tags(document: bytes) -> kinds.Tags | None:
    tags = tags_from(document, h.TAGS_PER_BUCKET_MAX)
    return kinds.Tags(tags) if tags else None


BUCKET_TAGS = Row(kinds.TAGGING, _bucket_tags, lambda value: write_tagging(value.tags), NoSuchTagSet, put_status=204)
