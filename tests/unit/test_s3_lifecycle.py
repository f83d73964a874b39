"""Lifecycle documents: what they mean, and the code of AWS for each one that is wrong."""

from __future__ import annotations

import pytest

from storaged.errors import S3Error
from storaged.objects.code.lifecycle import (
    DAY_MS,
    Rules,
    Subject,
    current_due,
    due_day,
    first_look,
    marker_due,
    noncurrent_due,
    upload_due,
)
from storaged.objects.configuration.lifecycle import LifecycleFilter, LifecycleRule
from storaged.s3.ops.lifecycle import parse, show

DAYS = "<Expiration><Days>1</Days></Expiration>"
STATUS = "<Status>Enabled</Status>"
TAG = "<Tag><Key>a</Key><Value>1</Value></Tag>"


def document(*rules: str) -> bytes:
    return f"<LifecycleConfiguration>{''.join(rules)}</LifecycleConfiguration>".encode()


def rule(*parts: str, where: str = "<Filter/>", status: str = STATUS, rule_id: str = "") -> str:
    named = f"<ID>{rule_id}</ID>" if rule_id else ""
    return f"<Rule>{named}{where}{status}{''.join(parts)}</Rule>"


def noncurrent(days: object = 1, newer: object = "") -> str:
    more = f"<NewerNoncurrentVersions>{newer}</NewerNoncurrentVersions>" if newer != "" else ""
    return f"<NoncurrentVersionExpiration><NoncurrentDays>{days}</NoncurrentDays>{more}</NoncurrentVersionExpiration>"


def where(content: str) -> str:
    return f"<Filter>{content}</Filter>"


ABORT = "<AbortIncompleteMultipartUpload><DaysAfterInitiation>7</DaysAfterInitiation></AbortIncompleteMultipartUpload>"
MARKER = "<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>"
KEPT = "<Expiration><ExpiredObjectDeleteMarker>false</ExpiredObjectDeleteMarker></Expiration>"

WRONG = [
    ("no rules", document(), "MalformedXML"),
    ("not XML", b"<LifecycleConfiguration><Rule>", "MalformedXML"),
    ("another document", b"<Tagging/>", "MalformedXML"),
    ("an unknown element", document(rule(DAYS, "<Colour>red</Colour>")), "MalformedXML"),
    ("an element twice", document(rule(DAYS, DAYS)), "MalformedXML"),
    ("no filter and no prefix", document(rule(DAYS, where="")), "MalformedXML"),
    ("filter and prefix", document(rule(DAYS, where="<Prefix>a</Prefix><Filter/>")), "InvalidRequest"),
    ("old and new rules", document(rule(DAYS), rule(DAYS, where="<Prefix>a</Prefix>")), "InvalidRequest"),
    ("no status", document(rule(DAYS, status="")), "MalformedXML"),
    ("status in lower case", document(rule(DAYS, status="<Status>enabled</Status>")), "MalformedXML"),
    ("no action", document(rule()), "InvalidRequest"),
    ("an ID of 256", document(rule(DAYS, rule_id="x" * 256)), "InvalidArgument"),
    ("an ID twice", document(rule(DAYS, rule_id="x"), rule(DAYS, rule_id="x")), "InvalidArgument"),
    ("no days", document(rule("<Expiration><Days>0</Days></Expiration>")), "InvalidArgument"),
    ("negative days", document(rule("<Expiration><Days>-1</Days></Expiration>")), "InvalidArgument"),
    ("days in words", document(rule("<Expiration><Days>one</Days></Expiration>")), "MalformedXML"),
    ("very many digits", document(rule(f"<Expiration><Days>{'9' * 5000}</Days></Expiration>")), "MalformedXML"),
    ("an empty expiration", document(rule("<Expiration/>")), "MalformedXML"),
    (
        "days and date",
        document(rule("<Expiration><Days>1</Days><Date>2030-01-01T00:00:00Z</Date></Expiration>")),
        "MalformedXML",
    ),
    (
        "days and marker",
        document(
            rule("<Expiration><Days>1</Days><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>")
        ),
        "MalformedXML",
    ),
    (
        "marker neither true nor false",
        document(rule("<Expiration><ExpiredObjectDeleteMarker>1</ExpiredObjectDeleteMarker></Expiration>")),
        "MalformedXML",
    ),
    ("a date at noon", document(rule("<Expiration><Date>2030-01-01T12:00:00Z</Date></Expiration>")), "InvalidArgument"),
    ("a date that is none", document(rule("<Expiration><Date>tomorrow</Date></Expiration>")), "MalformedXML"),
    ("noncurrent days 0", document(rule(noncurrent(0))), "InvalidArgument"),
    ("101 newer versions", document(rule(noncurrent(1, 101))), "InvalidArgument"),
    ("0 newer versions", document(rule(noncurrent(1, 0))), "InvalidArgument"),
    ("newer versions in an old rule", document(rule(noncurrent(1, 3), where="<Prefix/>")), "InvalidRequest"),
    ("abort with tags", document(rule(ABORT, where=where(TAG))), "InvalidRequest"),
    (
        "abort with sizes",
        document(rule(ABORT, where=where("<ObjectSizeLessThan>5</ObjectSizeLessThan>"))),
        "InvalidRequest",
    ),
    ("marker with tags", document(rule(MARKER, where=where(TAG))), "InvalidRequest"),
    ("and with one condition", document(rule(DAYS, where=where("<And><Prefix>a</Prefix></And>"))), "MalformedXML"),
    (
        "a tag twice",
        document(rule(DAYS, where=where(f"<And>{TAG}{TAG}</And>"))),
        "InvalidRequest",
    ),
    ("a tag without a value", document(rule(DAYS, where=where("<Tag><Key>a</Key></Tag>"))), "MalformedXML"),
    (
        "sizes that contradict each other",
        document(
            rule(
                DAYS,
                where=where(
                    "<And><ObjectSizeGreaterThan>5</ObjectSizeGreaterThan><ObjectSizeLessThan>5</ObjectSizeLessThan></And>"
                ),
            )
        ),
        "InvalidRequest",
    ),
    (
        "an unknown condition",
        document(rule(DAYS, where=where("<Suffix>.log</Suffix>"))),
        "MalformedXML",
    ),
    ("a prefix of 1,025 bytes", document(rule(DAYS, where=where(f"<Prefix>{'x' * 1025}</Prefix>"))), "InvalidRequest"),
    ("1,001 rules", document(*[rule(DAYS, rule_id=str(number)) for number in range(1001)]), "InvalidRequest"),
    (
        "a transition",
        document(rule("<Transition><Days>30</Days><StorageClass>GLACIER</StorageClass></Transition>")),
        "InvalidStorageClass",
    ),
    (
        "a transition to an unknown class",
        document(rule(DAYS, "<Transition><Days>30</Days><StorageClass>ICE</StorageClass></Transition>")),
        "InvalidStorageClass",
    ),
    ("a transition to no class", document(rule("<Transition><Days>30</Days></Transition>")), "MalformedXML"),
    (
        "a noncurrent transition",
        document(
            rule(
                "<NoncurrentVersionTransition><NoncurrentDays>30</NoncurrentDays><StorageClass>GLACIER</StorageClass>"
                "</NoncurrentVersionTransition>"
            )
        ),
        "InvalidStorageClass",
    ),
]
"""https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketLifecycleConfiguration.html and
https://docs.aws.amazon.com/AmazonS3/latest/userguide/intro-lifecycle-rules.html"""


@pytest.mark.parametrize(("what", "data", "code"), WRONG, ids=[what for what, _, _ in WRONG])
def test_a_wrong_document_gets_the_code_of_aws(what: str, data: bytes, code: str) -> None:
    with pytest.raises(S3Error) as refused:
        parse(data)
    assert refused.value.code == code, what


def test_two_conditions_side_by_side_are_seen() -> None:
    """Refused with MalformedXML, as on AWS, unless buckets are ``legacy``: Ceph's suite writes such filters."""
    value, strict = parse(document(rule(DAYS, where=where(f"<Prefix>a</Prefix>{TAG}"))))
    assert not strict
    assert (value.rules[0].filter.prefix, value.rules[0].filter.tags) == ("a", {"a": "1"})
    assert parse(document(rule(DAYS, where=where(f"<And><Prefix>a</Prefix>{TAG}</And>"))))[1]


def test_a_document_is_printed_as_it_was_sent() -> None:
    rules = [
        rule(DAYS, rule_id="1"),
        rule("<Expiration><Date>2030-01-01T00:00:00.000Z</Date></Expiration>", rule_id="2", where=where(TAG)),
        rule(MARKER, noncurrent(3, 5), ABORT, rule_id="3", where=where("<Prefix>p/&amp;</Prefix>")),
        rule(
            noncurrent(3),
            rule_id="4",
            status="<Status>Disabled</Status>",
            where=where(f"<And><Prefix>p</Prefix>{TAG}<ObjectSizeGreaterThan>0</ObjectSizeGreaterThan></And>"),
        ),
    ]
    value, strict = parse(document(*rules))
    assert strict
    assert parse(show(value)) == (value, True)
    old = document(rule(DAYS, rule_id="1", where="<Prefix></Prefix>"))
    assert b"<Prefix></Prefix>" in show(parse(old)[0])
    assert b"<Filter>" not in show(parse(old)[0])


@pytest.mark.parametrize(
    "sent",
    [
        rule(DAYS, rule_id="1", where=where("<Prefix></Prefix>")),
        rule(DAYS, rule_id="1", where=where("")),
        rule(DAYS, rule_id="1", where=where(f"<And><Prefix></Prefix>{TAG}</And>")),
        rule(DAYS, rule_id="1", where=where(f"<And>{TAG}<ObjectSizeLessThan>9</ObjectSizeLessThan></And>")),
        rule(KEPT, rule_id="1"),
        rule(KEPT, noncurrent(3), rule_id="1"),
    ],
)
def test_what_says_nothing_is_printed_as_it_was_sent(sent: str) -> None:
    """Terraform writes ``filter {}`` as an empty prefix, and waits until it reads that, for three minutes. The tests of
    its provider, which run against AWS, have a rule whose only action is ``expired_object_delete_marker = false``."""
    value, _ = parse(document(sent))
    inner = sent.replace("<Filter/>", "<Filter></Filter>")
    assert sorted(show(value).decode().partition("<Rule>")[2]) == sorted(
        document(inner).decode().partition("<Rule>")[2]
    )
    assert parse(show(value))[0] == value
    assert not Rules(value.rules).markers or DAYS in sent


def test_a_rule_without_an_id_gets_one() -> None:
    data = document(rule(DAYS), rule(DAYS))
    first, second = parse(data)[0].rules
    assert first.id
    assert second.id
    assert first.id != second.id
    assert parse(data) == parse(data)


# --- when


def no_tags() -> dict[str, str]:
    return {}


def rules_of(*rules: LifecycleRule) -> Rules:
    return Rules(rules)


def says(prefix: str = "", **what: int) -> LifecycleRule:
    return LifecycleRule("r", True, LifecycleFilter(prefix), **what)  # type: ignore[arg-type]


def test_due_at_the_first_midnight_after_the_days() -> None:
    """AWS's example: 15 January 2014, 10:30 UTC, three days: 19 January, 00:00 UTC."""
    day = 16_085  # 15 January 2014
    made_ms = day * DAY_MS + 37_800_000
    assert due_day(made_ms, 3) == day + 4
    assert due_day(day * DAY_MS, 1) == day + 2, "never before the days have passed"
    assert due_day((day + 1) * DAY_MS - 1, 1) == day + 2


def test_the_shorter_expiration_wins() -> None:
    rules = rules_of(says(days=30), says("a", days=5), says(date_ms=400 * DAY_MS))
    due = current_due(rules, Subject(b"ab", 1, 0, no_tags))
    assert due is not None
    assert due.day == 6
    due = current_due(rules, Subject(b"b", 1, 390 * DAY_MS, no_tags))
    assert due is not None
    assert (due.day, due.rule.date_ms) == (400, 400 * DAY_MS)


def test_a_disabled_rule_does_nothing() -> None:
    rules = Rules([LifecycleRule("r", False, LifecycleFilter(), days=1, noncurrent_days=1, abort_days=1, marker=True)])
    assert not rules
    assert current_due(rules, Subject(b"k", 1, 0, no_tags)) is None


def test_noncurrent_counts_from_the_successor_and_from_the_later_clock() -> None:
    rules = rules_of(says(noncurrent_days=3, newer_noncurrent=2))
    subject = Subject(b"k", 1, 10 * DAY_MS, no_tags)
    assert noncurrent_due(rules, subject, 20 * DAY_MS, 1) is None
    for since_ms, day in ((20 * DAY_MS, 24), (5 * DAY_MS, 14)):
        due = noncurrent_due(rules, subject, since_ms, 2)
        assert due is not None
        assert due.day == day


def test_rules_with_tags_or_sizes_mean_no_markers() -> None:
    tagged = LifecycleRule("t", True, LifecycleFilter(tags={"a": "1"}), days=1, noncurrent_days=1)
    sized = LifecycleRule("s", True, LifecycleFilter(smaller_than=9), days=1, noncurrent_days=1)
    rules = Rules([tagged, sized])
    assert marker_due(rules, b"k", 0) is None
    assert noncurrent_due(rules, Subject(b"k", 0, 0, no_tags), 0, 0, is_marker=True) is None
    due = marker_due(rules_of(says(days=4), says(marker=True)), b"k", 0)
    assert due is not None
    assert due.day == 1


def test_uploads_and_first_looks() -> None:
    rules = rules_of(says("u/", abort_days=7))
    assert upload_due(rules, b"k", 0) is None
    due = upload_due(rules, b"u/k", 0)
    assert due is not None
    assert due.day == 8
    assert rules.prefixes == ()
    rules = rules_of(says("a", days=9), says("ab", noncurrent_days=3), says("b", noncurrent_days=3, newer_noncurrent=1))
    assert rules.prefixes == (b"a", b"b")
    assert first_look(rules, Subject(b"ab", 1, 0, no_tags), is_marker=False, versioned=False) == 10
    assert first_look(rules, Subject(b"ab", 1, 0, no_tags), is_marker=False, versioned=True) == 4
    assert first_look(rules, Subject(b"b", 1, 0, no_tags), is_marker=False, versioned=True) == 1
    assert first_look(rules, Subject(b"c", 1, 0, no_tags), is_marker=False, versioned=True) is None


def test_a_thousand_rules_cost_a_look_little() -> None:
    data = document(*[rule(DAYS, rule_id=str(n), where=where(f"<Prefix>{n}/</Prefix>")) for n in range(1000)])
    rules = Rules(parse(data)[0].rules)
    assert len(rules.prefixes) == 1000
    due = current_due(rules, Subject(b"999/k", 1, 0, no_tags))
    assert due is not None
    assert due.rule.id == "999"
