"""Conditions: a second parser, written character by character, agrees with the first over hostile header values."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from storaged.errors import InvalidArgument, NotImplemented
from storaged.objects.etags import ANY, NO_TAG, AnyTag, Tags, matches_strongly
from storaged.s3 import conditions as c
from tests.examples import examples

ETAG = "d41d8cd98f00b204e9800998ecf8427e-3"

pieces = st.sampled_from([
    '"', "*", ",", " ", "\t", "W/", "w/", ETAG, f'"{ETAG}"', f'W/"{ETAG}"', '""', '"a,b"', "x", "\\", "'", "é", '"é"', "/", ETAG.upper(),  # noqa: E501
])  # fmt: skip
texts = st.lists(pieces, max_size=9).map("".join) | st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n\x00"), max_size=30
)


def oracle(text: str) -> AnyTag | Tags:
    """A state machine over single characters, for what ``parse_tags`` documents."""
    if text.strip(" \t") == "*":
        return ANY
    strong: list[str] = []
    weak: list[str] = []
    rest = list(text)

    def blank() -> None:
        while rest and rest[0] in " \t":
            del rest[0]

    while True:
        blank()
        if not rest:
            break
        if rest[0] == ",":
            del rest[0]
            continue
        into = strong
        if rest[:2] == ["W", "/"] and len(rest) > 2 and rest[2] != "," and not rest[2].isspace():
            into = weak
            del rest[:2]
        word = ""
        if rest[0] == '"':
            del rest[0]
            while rest and rest[0] != '"':
                word += rest.pop(0)
            if not rest:
                return NO_TAG
            del rest[0]
        else:
            while rest and rest[0] not in '",' and not rest[0].isspace():
                word += rest.pop(0)
            if not word or word == "*":
                return NO_TAG
        blank()
        if rest and rest[0] != ",":
            return NO_TAG
        into.append(word)
    return Tags(tuple(strong), tuple(weak)) if strong or weak else NO_TAG


@given(texts)
@example('*,"x"')
@example("W/")
@example('W/""')
@example(f'"{ETAG}')
@settings(max_examples=examples(2000))
def test_two_parsers_of_entity_tags_agree(text: str) -> None:
    assert c.parse_tags(text) == oracle(text)


@given(texts, texts, st.sampled_from(sorted(c.NAMES)), st.sampled_from(sorted(c.NAMES)))
@settings(max_examples=examples(1000))
def test_a_write_with_any_condition_is_conditional_or_refused(one: str, other: str, first: str, second: str) -> None:
    """No condition gets lost: the answer is a condition for each header, or a refusal."""
    headers = {first: one, second: other}
    try:
        found = c.write_conditions(headers)
    except NotImplemented:
        dated = headers.keys() & {"if-modified-since", "if-unmodified-since"}
        tags = oracle(headers.get("if-none-match", "*"))
        assert dated or (
            isinstance(tags, Tags)
            and (not tags.strong or tags.weak or any(not tag or "*" in tag for tag in tags.strong))
        )
        return
    assert (found.if_match is not None) == ("if-match" in headers)
    assert found.if_none_match == (oracle(headers["if-none-match"]) if "if-none-match" in headers else None)
    assert found.if_none_match != NO_TAG
    if found.if_match is not None and matches_strongly(found.if_match, ETAG):
        assert ETAG in headers["if-match"] or headers["if-match"].strip(" \t") == "*"


@given(texts, texts, texts)
@settings(max_examples=examples(500))
def test_a_delete_with_any_condition_is_conditional_or_refused(etag: str, size: str, modified: str) -> None:
    try:
        found = c.deletion(etag, size, modified, ("Size", "LastModifiedTime"))
    except InvalidArgument:
        assert not (size.isascii() and size.isdigit()) or c.parse_time(modified) is None
        return
    assert found.if_match == oracle(etag)
    assert found.if_match_size == int(size)
    assert found.if_match_modified_ms is not None


@given(
    texts
    | st.text(max_size=80)
    | st.from_regex(r"[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d (GMT|[+-]\d{4,6})", fullmatch=True)
)
@example("0 0 0 0 0 0")
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("0001-01-01T00:00:00+23:59")
@example("")
def test_dates_are_read_or_are_none_and_never_fail(text: str) -> None:
    assert isinstance(c.parse_http_time(text), int | None)
    assert isinstance(c.parse_time(text), int | None)


@given(st.integers(0, 253_402_300_799))
def test_the_dates_that_are_sent_are_read_back(seconds: int) -> None:
    from storaged.s3.headers import http_time

    assert c.parse_http_time(http_time(seconds)) == seconds * 1000
