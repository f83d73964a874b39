"""XML: what is written reads back, and nothing that arrives makes the parser do anything but answer."""

from __future__ import annotations

import time
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import MalformedXML
from storaged.s3 import xml

representable = st.text(
    st.characters(
        codec="utf-8", exclude_characters="".join(map(chr, (*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF)))
    )
)


@given(representable)
def test_text_survives_escaping(text: str) -> None:
    root = ElementTree.fromstring(xml.document("Root", xml.element("Key", text)))
    assert (root[0].text or "") == text
    assert xml.parse(xml.document("Root", xml.element("Key", text)), "Root").fields({"Key"})["Key"] == text


@given(st.text(st.characters(codec="utf-8")))
def test_what_xml_can_not_represent_becomes_references(text: str) -> None:
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
    special = "\r\x7f" + "".join(map(chr, (*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF)))
    wanted = "".join(named.get(each, f"&#x{ord(each):X};" if each in special else each) for each in text)
    assert xml.escape(text) == wanted


def test_a_page_of_hostile_keys_delays_other_requests_for_little_more_than_any_other() -> None:
    began_s = time.thread_time()
    assert xml.escape_keys([b"\x01" * 1024] * 1000) == ["&#x1;" * 1024] * 1000
    assert time.thread_time() - began_s < 0.3


@given(st.text(st.characters(codec="utf-8"), max_size=50))
def test_a_url_encoded_key_is_always_plain_ascii(key: str) -> None:
    assert xml.escape(xml.escape_key(key.encode(), url=True)).isascii()


@given(st.binary(max_size=200))
def test_garbage_is_malformed_and_nothing_else(data: bytes) -> None:
    with pytest.raises(MalformedXML):
        xml.parse(data, "Delete")


@given(st.integers(xml.DEPTH_MAX + 1, 400))
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(MalformedXML):
        xml.parse(b"<a>" * depth + b"</a>" * depth, "a")


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE Delete [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><Delete>&b;</Delete>',
        b'<!DOCTYPE Delete SYSTEM "http://127.0.0.1/evil.dtd"><Delete/>',
        b'<?xml version="1.0"?><!DOCTYPE Delete [<!ENTITY x SYSTEM "file:///etc/passwd">]><Delete>&x;</Delete>',
        "<!DOCTYPE Delete []><Delete/>".encode("utf-16"),
        b"<Delete>&undeclared;</Delete>",
        b"<Delete><Object></Delete>",
        b"<Other/>",
        b"",
    ],
)
def test_doctypes_entities_and_broken_documents_are_refused(document: bytes) -> None:
    with pytest.raises(MalformedXML):
        xml.parse(document, "Delete")


def test_documents_read_with_the_namespace_with_a_prefix_and_without() -> None:
    for document in (
        b"<Tagging><TagSet/></Tagging>",
        f'<Tagging xmlns="{xml.NAMESPACE}"><TagSet/></Tagging>'.encode(),
        f'<s3:Tagging xmlns:s3="{xml.NAMESPACE}"><s3:TagSet/></s3:Tagging>'.encode(),
    ):
        assert [child.name for child in xml.parse(document, "Tagging").children] == ["TagSet"]


def test_too_many_elements_are_refused() -> None:
    with pytest.raises(MalformedXML):
        xml.parse(b"<a>" + b"<b/>" * xml.ELEMENTS_MAX + b"</a>", "a")


@given(
    st.lists(
        st.one_of(st.text("ab/.-~_\n", max_size=4), st.text(st.characters(codec="utf-8"), max_size=8)), max_size=4
    ),
    st.booleans(),
)
def test_many_keys_are_escaped_as_each_of_them_is(keys: list[str], url: bool) -> None:
    packed = [key.encode() for key in keys]
    assert xml.escape_keys(packed, url) == [xml.escape_key(key, url) for key in packed]


@given(st.lists(st.integers(0, 253_402_300_799_999)))
def test_many_times_are_written_as_each_of_them_is(times_ms: list[int]) -> None:
    assert xml.iso_times(times_ms) == [xml.iso_time(time_ms) for time_ms in times_ms]
