"""Which condition keys an action has, against AWS's reference; and that no parameter or header of a request satisfies a
condition of an action that does not have it.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from storaged.errors import AccessDenied, MalformedPolicy
from storaged.objects.api import Principal
from storaged.s3.auth.action_keys import KEYS, has_key
from storaged.s3.auth.actions import ACTIONS, DELETE_KEY, action_of
from storaged.s3.auth.conditions import KEYS as KNOWN
from storaged.s3.auth.facts import Facts
from storaged.s3.auth.policy import Policy, identity_policy_of, parse, policy_of
from storaged.s3.authorization import EXTRA
from storaged.s3.request import Request
from storaged.s3.routes import BUCKET, OBJECT

REFERENCE = "https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html"
"""Column «Condition keys» of the table of actions, read by keys instead of by actions."""

_LISTS = {"ListBucket", "ListBucketVersions"}
_ACLS = {
    "BypassGovernanceRetention",
    "CreateBucket",
    "PutBucketAcl",
    "PutObject",
    "PutObjectAcl",
    "PutObjectVersionAcl",
}
_WRITES = {"BypassGovernanceRetention", "PutObject"}
_RETENTIONS = {"PutObject", "PutObjectRetention"}
_VERSIONS = {
    "DeleteObjectVersion", "DeleteObjectVersionTagging", "GetObjectVersion", "GetObjectVersionAcl",
    "GetObjectVersionAttributes", "GetObjectVersionTagging", "GetObjectVersionTorrent", "PutObjectVersionAcl",
    "PutObjectVersionTagging",
}  # fmt: skip
_EXISTING = {
    "DeleteObjectTagging", "DeleteObjectVersionTagging", "GetObject", "GetObjectAcl", "GetObjectAttributes",
    "GetObjectTagging", "GetObjectVersion", "GetObjectVersionAcl", "GetObjectVersionAttributes",
    "GetObjectVersionTagging", "PutObjectAcl", "PutObjectTagging", "PutObjectVersionAcl", "PutObjectVersionTagging",
}  # fmt: skip
_TAGGED = {"BypassGovernanceRetention", "PutObject", "PutObjectTagging", "PutObjectVersionTagging"}

ACTIONS_WITH: Final[dict[str, set[str]]] = {
    "s3:prefix": _LISTS,
    "s3:delimiter": _LISTS,
    "s3:max-keys": _LISTS,
    "s3:versionid": _VERSIONS,
    "s3:existingobjecttag/a": _EXISTING,
    "s3:requestobjecttag/a": _TAGGED,
    "s3:requestobjecttagkeys": _TAGGED,
    "s3:x-amz-acl": _ACLS,
    "s3:x-amz-grant-full-control": _ACLS,
    "s3:x-amz-grant-read": _ACLS,
    "s3:x-amz-grant-read-acp": _ACLS,
    "s3:x-amz-grant-write": _ACLS,
    "s3:x-amz-grant-write-acp": _ACLS,
    "s3:x-amz-copy-source": _WRITES,
    "s3:x-amz-metadata-directive": _WRITES,
    "s3:x-amz-website-redirect-location": _WRITES,
    "s3:x-amz-server-side-encryption": _WRITES | {"UpdateObjectEncryption"},
    "s3:x-amz-server-side-encryption-aws-kms-key-id": _WRITES | {"UpdateObjectEncryption"},
    "s3:x-amz-server-side-encryption-customer-algorithm": _WRITES,
    "s3:x-amz-storage-class": _WRITES | {"PutObjectAcl", "PutObjectVersionAcl"},
    "s3:x-amz-object-ownership": {"CreateBucket"},
    "s3:locationconstraint": {"CreateBucket"},
    "s3:object-lock-mode": _RETENTIONS,
    "s3:object-lock-retain-until-date": _RETENTIONS,
    "s3:object-lock-legal-hold": {"PutObject", "PutObjectLegalHold"},
    "s3:inventoryaccessibleoptionalfields": {"PutInventoryConfiguration"},
    "s3:if-match": {"DeleteObject", "PutObject"},
    "s3:if-none-match": {"PutObject"},
}
OF_ALL = {
    "s3:authtype", "s3:resourceaccount", "s3:signatureage", "s3:signatureversion", "s3:x-amz-content-sha256",
    "s3:dataaccesspointarn", "s3:dataaccesspointaccount", "s3:accesspointnetworkorigin",
}  # fmt: skip


def asked() -> set[str]:
    """All actions of S3 that a request may need here."""
    routed = {each.name for table in (BUCKET, OBJECT) for methods in table.values() for each in methods.values()}
    rows = [action_of(name) for name in routed | ACTIONS.keys()] + [DELETE_KEY, *EXTRA.values()]
    return {name for row in rows for name in row.names + row.versioned} | {"s3:CreateBucket", "s3:ListAllMyBuckets"}


@pytest.mark.parametrize("key", ACTIONS_WITH)
def test_an_action_has_the_keys_of_the_reference_and_no_others(key: str) -> None:
    having = {f"s3:{name}" for name in ACTIONS_WITH[key]}
    assert {name for name in asked() | KEYS.keys() if has_key(name, key)} == having
    assert all(has_key(name.lower(), key) for name in having), "actions are compared without case"


def test_every_key_that_a_policy_may_have_is_in_the_table() -> None:
    known = {key for key in KNOWN if key.startswith("s3:")} | {"s3:existingobjecttag/a", "s3:requestobjecttag/a"}
    assert known == ACTIONS_WITH.keys() | OF_ALL
    assert KEYS.keys() <= asked(), "a row whose action no request needs"


@pytest.mark.parametrize("key", [*sorted(OF_ALL), "aws:sourceip", "aws:principaltag/Team"])
def test_keys_about_the_signature_and_the_sender_are_there_for_all_actions(key: str) -> None:
    assert all(has_key(name, key) for name in asked())


def test_calls_of_iam_and_sts_have_none_of_s3_s_keys_and_all_of_their_own() -> None:
    for name in ("iam:CreateUser", "sts:AssumeRole"):
        assert not any(has_key(name, key) for key in ACTIONS_WITH.keys() | OF_ALL)
        assert all(has_key(name, key) for key in ("iam:policyarn", "sts:externalid", "aws:requesttag/a"))


# --- what a request can't claim ---------------------------------------------------------------------------------------

OTHER = Principal("b" * 64, "b", "AKB")


def stored(effect: str, action: Any, **more: Any) -> str:
    statement = {"Effect": effect, "Principal": "*", "Action": action, "Resource": "*", **more}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


@pytest.mark.parametrize(
    ("action", "key", "value"),
    [
        ("s3:GetObject", "s3:prefix", "home/"),
        ("s3:DeleteObject", "s3:prefix", "home/"),
        ("s3:GetObject", "s3:x-amz-acl", "private"),
        ("s3:DeleteObject", "s3:x-amz-acl", "private"),
        ("s3:PutBucketPolicy", "s3:x-amz-acl", "private"),
        ("s3:GetObject", "s3:x-amz-copy-source", "bucket/k"),
        ("s3:GetObject", "s3:versionid", "v1"),
        ("s3:DeleteBucket", "s3:max-keys", "1"),
        ("s3:GetObject", "s3:if-none-match", "*"),
        ("s3:GetObject", "s3:RequestObjectTag/a", "b"),
        ("s3:DeleteObject", "s3:ExistingObjectTag/a", "b"),
    ],
)
def test_a_condition_on_a_key_of_another_action_is_not_satisfied_by_the_request(
    action: str, key: str, value: str
) -> None:
    """Source: REFERENCE. A missing key fails a condition, and a negated operator holds for it:
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html"""

    def decided(text: str) -> bool | None:
        return policy_of(text).verdict(OTHER, action, "arn:aws:s3:::bucket/k", lambda name: (value,))

    assert decided(stored("Allow", "s3:*", Condition={"StringEquals": {key: value}})) is None
    assert decided(stored("Deny", "s3:*", Condition={"StringNotEquals": {key: value}})) is False
    assert decided(stored("Deny", "s3:*", Condition={"Null": {key: "true"}})) is False


def test_a_variable_of_a_key_that_the_action_does_not_have_names_no_resource() -> None:
    statement = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::bucket/${s3:prefix}"}
    policy = policy_of(json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    for action, verdict in (("s3:ListBucket", True), ("s3:GetObject", None)):
        assert policy.verdict(OTHER, action, "arn:aws:s3:::bucket/k", lambda name: ("k",)) is verdict


@pytest.mark.parametrize(
    ("action", "key"),
    [
        ("s3:GetObject", "s3:prefix"),
        (["s3:Get*", "s3:DeleteObject"], "s3:x-amz-acl"),
        ("s3:DeleteObject", "s3:ExistingObjectTag/a"),
        ("s3:ListBucketMultipartUploads", "s3:prefix"),
        (["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"], "s3:prefix"),
        (["s3:GetObject", "s3:DeleteObject"], "s3:ExistingObjectTag/a"),
        (["s3:GetObject", "s3:PutObject"], "s3:ExistingObjectTag/a"),
        (["s3:Get*", "s3:Delete*Version"], "s3:ExistingObjectTag/a"),
    ],
)
def test_a_bucket_policy_with_a_condition_that_an_action_of_its_does_not_have_is_refused(action: Any, key: str) -> None:
    """AWS's answer, as seen in https://github.com/humanmade/S3-Uploads/issues/239: there s3:ListBucket has the key, and
    the others have not. So no statement seems to protect what it does not. A policy that is stored is kept: without it
    the bucket would have none."""
    text = stored("Deny", action, Condition={"StringEquals": {key: "x"}})
    with pytest.raises(MalformedPolicy, match="Conditions do not apply to combination of actions and resources"):
        parse(text.encode(), "bucket")
    assert len(policy_of(text).statements) == 1


@pytest.mark.parametrize(
    ("action", "key"),
    [
        ("*", "s3:prefix"),
        ("s3:*", "s3:ExistingObjectTag/a"),
        ("s3:get*", "s3:ExistingObjectTag/a"),
        (["s3:ListBucketVersions", "s3:ListBucket"], "s3:prefix"),
        (["s3:Get*", "s3:Delete*Tagging"], "s3:ExistingObjectTag/a"),
        (["s3:PutObject", "s3:ReplicateObject"], "s3:x-amz-server-side-encryption"),
        ("s3:GetObject", "aws:SourceIp"),
        ("s3:GetBucketLogging", "s3:authType"),
    ],
)
def test_a_bucket_policy_is_taken_when_each_of_its_actions_has_the_key(action: Any, key: str) -> None:
    value = "192.0.2.0/24" if key == "aws:SourceIp" else "x"
    operator = "IpAddress" if key == "aws:SourceIp" else "StringEquals"
    parsed = parse(stored("Allow", action, Condition={operator: {key: value}}).encode(), "bucket")
    assert parsed.statements[0].conditions[0].wanted == (value,)


@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("PutObjectRetention", "s3:object-lock-mode"),
        ("PutObjectRetention", "s3:object-lock-retain-until-date"),
        ("PutObjectLegalHold", "s3:object-lock-legal-hold"),
        ("UpdateObjectEncryption", "s3:x-amz-server-side-encryption"),
        ("UpdateObjectEncryption", "s3:x-amz-server-side-encryption-aws-kms-key-id"),
    ],
)
def test_no_header_claims_what_the_document_of_a_request_says(operation: str, key: str) -> None:
    """What can't be known before the document is read counts as denied."""
    header = f"x-amz-{key[3:]}" if key.startswith("s3:object-lock") else key[3:]
    for named in (operation, "PutObject"):
        request = Request("R", "PUT", b"/bucket/k", "127.0.0.1", True, operation=named)
        facts = Facts(request, "a" * 64, 0, headers={header: "claimed"}, found=None)
        if named == "PutObject":
            assert facts(key) == ("claimed",)
        else:
            with pytest.raises(AccessDenied):
                facts(key)


@pytest.mark.parametrize(
    ("effect", "operator", "passed"),
    [("Allow", "ForAllValues:StringEquals", True), ("Deny", "ForAnyValue:StringNotEquals", None)],
)
def test_what_depends_on_the_fields_of_an_inventory_is_denied(effect: str, operator: str, passed: bool | None) -> None:
    """They are in the document, as on AWS, which has this condition in its examples. Without a value, a set operator
    would let all fields pass.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/example-bucket-policies.html"""
    condition = {operator: {"s3:InventoryAccessibleOptionalFields": ["Size", "StorageClass"]}}
    statement = {"Effect": effect, "Action": "s3:PutInventoryConfiguration", "Resource": "*", "Condition": condition}
    identity = identity_policy_of(json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    bucket = parse(stored(effect, "s3:PutInventoryConfiguration", Condition=condition).encode(), "bucket")
    for policy in (identity, bucket):

        def decided(operation: str, policy: Policy = policy) -> bool | None:
            request = Request("R", "PUT", b"/bucket?inventory&id=a", "127.0.0.1", True, operation=operation)
            facts = Facts(request, "a" * 64, 0, headers={}, found=None)
            return policy.verdict(OTHER, "s3:PutInventoryConfiguration", "arn:aws:s3:::bucket", facts)

        with pytest.raises(AccessDenied):
            decided("PutBucketInventoryConfiguration")
        assert decided("DeleteBucketInventoryConfiguration") is passed
