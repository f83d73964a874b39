"""Documents that clients send: what they may be made of, and that no document keeps the event loop."""

from __future__ import annotations

import pytest

from storaged import errors
from storaged.s3 import xml

S3 = xml.NAMESPACE


def tags(count: int) -> bytes:
    rows = b"".join(b"<Tag><Key>k%d</Key><Value>v</Value></Tag>" % number for number in range(count))
    return b"<Tagging><TagSet>" + rows + b"</TagSet></Tagging>"


@pytest.mark.parametrize(
    "document",
    [
        b'<Tagging xmlns="http://example.org/"/>',
        b'<Tagging xmlns="http://s3.amazonaws.com/doc/2006-03-01"/>',
        f'<Tagging xmlns="{S3}"><TagSet xmlns="urn:x"/></Tagging>'.encode(),
        f'<a:Tagging xmlns:a="{S3}x"/>'.encode(),
        f'<Tagging xmlns="{S3}" xmlns:b="urn:b"><b:TagSet/></Tagging>'.encode(),
    ],
)
def test_an_element_of_a_foreign_namespace_is_refused(document: bytes) -> None:
    with pytest.raises(errors.MalformedXML):
        xml.parse(document, "Tagging")


@pytest.mark.parametrize(
    "document", [f'<Tagging xmlns="{S3}"/>', "<Tagging/>", f'<a:Tagging xmlns:a="{S3}"><TagSet/></a:Tagging>']
)
def test_s3s_namespace_and_none_are_taken(document: str) -> None:
    assert xml.parse(document.encode(), "Tagging").name == "Tagging"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("start", ["", " ", '<?xml version="1.0"?>', "\ufeff"])
def test_a_document_in_another_encoding_is_refused(encoding: str, start: str) -> None:
    document = (start + "<Tagging><TagSet><Tag><Key>\u00e9</Key></Tag></TagSet></Tagging>").encode(encoding)
    with pytest.raises(errors.MalformedXML):
        xml.parse(document, "Tagging")


@pytest.mark.parametrize("encoding", ["UTF-16", "ISO-8859-1", "US-ASCII", "UTF-7", "\u212a"])
def test_a_document_that_says_it_is_not_utf_8_is_refused(encoding: str) -> None:
    with pytest.raises(errors.MalformedXML):
        xml.parse(f'<?xml version="1.0" encoding="{encoding}"?><Tagging/>'.encode(), "Tagging")


@pytest.mark.parametrize(
    "start",
    [
        "",
        "\ufeff",
        '<?xml version="1.0"?>',
        '<?xml version="1.0" encoding="utf-8"?>',
        '<?xml version="1.0" encoding="UTF-8"?>',
    ],
)
def test_utf_8_is_taken_with_and_without_saying_so(start: str) -> None:
    assert xml.parse((start + "<Tagging/>").encode(), "Tagging").name == "Tagging"


@pytest.mark.parametrize("root", xml.DOCUMENT_ELEMENTS_MAX)
def test_each_document_has_a_number_of_elements_of_its_own(root: str) -> None:
    most = xml.DOCUMENT_ELEMENTS_MAX[root]
    document = f"<{root}>{{}}</{root}>"
    xml.parse(document.format("<a/>" * (most - 1)).encode(), root)
    with pytest.raises(errors.MalformedXML):
        xml.parse(document.format("<a/>" * most).encode(), root)


def test_what_s3_allows_is_within_the_bounds() -> None:
    assert len(xml.parse(tags(50), "Tagging").children[0].children) == 50
    part = b"<Part><PartNumber>1</PartNumber><ETag>e</ETag><ChecksumSHA256>c</ChecksumSHA256></Part>"
    assert (
        len(
            xml.parse(
                b"<CompleteMultipartUpload>" + part * 10_000 + b"</CompleteMultipartUpload>", "CompleteMultipartUpload"
            ).children
        )
        == 10_000
    )
    key = b"&#x10FFFF;" * 256
    entry = (
        b"<Object><Key>"
        + key
        + b"</Key><VersionId>v</VersionId><ETag>e</ETag><LastModifiedTime>t</LastModifiedTime><Size>1</Size></Object>"
    )
    assert len(xml.parse(b"<Delete>" + entry * 1000 + b"<Quiet>true</Quiet></Delete>", "Delete").children) == 1001


def test_attributes_are_bounded_before_they_are_taken_apart() -> None:
    few = b" ".join(b'a%d="1"' % number for number in range(xml.ATTRIBUTES_MAX))
    xml.parse(b"<Tagging " + few + b"/>", "Tagging")
    with pytest.raises(errors.MalformedXML):
        xml.parse(b"<Tagging " + few + b' b="1"/>', "Tagging")


class _Counted(bytes):
    """Counts what is taken of it."""

    taken = 0

    def __getitem__(self, index: object) -> bytes:  # type: ignore[override]
        found = super().__getitem__(index)  # type: ignore[index]
        self.taken += len(found)
        return found


@pytest.mark.parametrize(
    "document",
    [
        b"<Tagging " + b" ".join(b'a%d="1"' % number for number in range(150_000)) + b"/>",
        b"<Tagging><!--" + b"x" * 1_000_000 + b"--></Tagging>",
        b"<Tagging a='" + b"&amp;" * 200_000 + b"'/>",
        b"<T" + b"a" * 1_000_000 + b"/>",
        b"<Tagging><?a " + b"x" * 1_000_000 + b"?></Tagging>",
        tags(30_000),
    ],
)
def test_of_a_document_that_is_made_to_take_long_little_is_read(document: bytes) -> None:
    counted = _Counted(document)
    with pytest.raises(errors.MalformedXML):
        xml.parse(counted, "Tagging")
    assert counted.taken <= 2 * xml.TOKEN_BYTES_MAX


# --- where they are understood
