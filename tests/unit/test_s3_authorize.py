"""The one decision about access, against a table of decisions that AWS's documentation describes, each with its source;
and what holds for every policy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import pytest

from storaged.errors import AccessDenied, MalformedPolicy, MethodNotAllowed
from storaged.objects.api import ObjectAccess, Principal
from storaged.objects.configuration import kinds
from storaged.objects.configuration.access import (
    ACL,
    ENFORCED,
    EVERYBODY,
    OWNERSHIP,
    POLICY,
    PUBLIC_ACCESS_BLOCK,
    SIGNED,
    WRITER,
    Acl,
    AclEntry,
    Ownership,
    PolicyText,
    PublicAccessBlock,
)
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.identity import account_of, arn_of
from storaged.objects.records import BucketRecord
from storaged.s3.auth.actions import ACTIONS, Action, action_of
from storaged.s3.auth.authorize import UNKNOWN, Context, ObjectWanted, Resource, Unknown, authorize
from storaged.s3.auth.policy import parse
from storaged.s3.request import ANONYMOUS
from storaged.s3.routes import BUCKET, OBJECT

OWNER, OTHER, THIRD = (Principal(letter * 64, letter, f"AK{letter}") for letter in "abc")

GUIDE = "https://docs.aws.amazon.com/AmazonS3/latest/userguide/"
IAM = "https://docs.aws.amazon.com/IAM/latest/UserGuide/"
EXAMPLES = GUIDE + "example-bucket-policies.html"
OPERATORS = IAM + "reference_policies_elements_condition_operators.html"
LOGIC = IAM + "reference_policies_evaluation-logic.html"
BLOCK = GUIDE + "access-control-block-public-access.html"
LISTS = GUIDE + "acl-overview.html"
OWNERSHIP_PAGE = GUIDE + "about-object-ownership.html"
MANY = IAM + "reference_policies_condition-logic-multiple-context-keys-or-values.html"
VARIABLES = IAM + "reference_policies_variables.html"
KEYS = GUIDE + "amazon-s3-policy-keys.html"

ALL = "arn:aws:s3:::bucket/*"
ITSELF = "arn:aws:s3:::bucket"


def statement(effect: str, action: Any, resource: Any = ALL, principal: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": effect, "Principal": principal, "Action": action, "Resource": resource, **more}


def allow(action: Any, resource: Any = ALL, principal: Any = "*", **more: Any) -> dict[str, Any]:
    return statement("Allow", action, resource, principal, **more)


def deny(action: Any, resource: Any = ALL, principal: Any = "*", **more: Any) -> dict[str, Any]:
    return statement("Deny", action, resource, principal, **more)


def text(*statements: dict[str, Any], version: str = "2012-10-17") -> str:
    return json.dumps({"Version": version, "Statement": list(statements)})


def aws(*names: str) -> dict[str, Any]:
    return {"AWS": list(names)}


class Case(NamedTuple):
    what: str
    source: str
    who: Principal
    operation: str
    allowed: bool
    policy: tuple[dict[str, Any], ...] = ()
    facts: Mapping[str, str] = {}
    block: PublicAccessBlock | None = None
    rule: str = ENFORCED
    acl: tuple[AclEntry, ...] | None = None
    found: ObjectAccess | Unknown | None = UNKNOWN
    key: bytes | None = b"key"
    version: str = ""


MINE = ObjectAccess(OWNER.user_id, None, {})
THEIRS = ObjectAccess(OTHER.user_id, None, {})
PUBLIC_OBJECT = ObjectAccess(OWNER.user_id, Acl((AclEntry(EVERYBODY, "READ"),)), {})
PREFIX = allow("s3:ListBucket", ITSELF, Condition={"StringEquals": {"s3:prefix": "projects"}})
FULL_TO_OWNER = allow(
    "s3:PutObject",
    principal=aws(account_of(OTHER.user_id)),
    Condition={"StringEquals": {"s3:x-amz-acl": "bucket-owner-full-control"}},
)
TLS_ONLY = deny("s3:*", [ITSELF, ALL], Condition={"Bool": {"aws:SecureTransport": "false"}})
FROM_NETWORK = deny("s3:*", [ITSELF, ALL], Condition={"NotIpAddress": {"aws:SourceIp": "192.0.2.0/24"}})
BY_TAG = allow("s3:GetObject", Condition={"StringEquals": {"s3:ExistingObjectTag/environment": "production"}})
HOME = allow("s3:*", "arn:aws:s3:::bucket/home/${aws:username}/*")

CASES = [
    # --- evaluation
    Case("what nothing allows is denied", LOGIC, OTHER, "GetObject", False),
    Case("and so for a client without a key", LOGIC, ANONYMOUS, "GetObject", False),
    Case("the owner has access", LOGIC, OWNER, "GetObject", True),
    Case("an allow is enough in a resource's policy", LOGIC, OTHER, "GetObject", True, (allow("s3:GetObject"),)),
    Case("a deny beats an allow", LOGIC, OTHER, "GetObject", False, (allow("s3:GetObject"), deny("s3:Get*"))),
    Case("in any order", LOGIC, OTHER, "GetObject", False, (deny("s3:Get*"), allow("s3:GetObject"))),
    Case("a deny holds for the owner", LOGIC, OWNER, "GetObject", False, (deny("s3:GetObject"),)),
    Case("an allow of another action does not", LOGIC, OTHER, "PutObject", False, (allow("s3:GetObject"),)),
    Case("nor of another resource", LOGIC, OTHER, "GetObject", False, (allow("s3:GetObject", ITSELF + "/other"),)),
    Case(
        "the owner always puts the policy",
        "https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketPolicy.html",
        OWNER, "PutBucketPolicy", True, (deny("s3:*", [ITSELF, ALL]),), key=None,
    ),
    Case(
        "and gets it",
        "https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetBucketPolicy.html",
        OWNER, "GetBucketPolicy", True, (deny("s3:*", [ITSELF, ALL]),), key=None,
    ),
    Case(
        "and deletes it",
        "https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteBucketPolicy.html",
        OWNER, "DeleteBucketPolicy", True, (deny("s3:*", [ITSELF, ALL]),), key=None,
    ),
    # --- principals
    Case(
        "an account names its users", IAM + "reference_policies_elements_principal.html", OTHER, "GetObject", True,
        (allow("s3:GetObject", principal=aws(account_of(OTHER.user_id))),),
    ),
    Case(
        "so does its root", IAM + "reference_policies_elements_principal.html", OTHER, "GetObject", True,
        (allow("s3:GetObject", principal=aws(f"arn:aws:iam::{account_of(OTHER.user_id)}:root")),),
    ),
    Case(
        "and a user's ARN", IAM + "reference_policies_elements_principal.html", OTHER, "GetObject", True,
        (allow("s3:GetObject", principal=aws(arn_of(OTHER.user_id, OTHER.display_name))),),
    ),
    Case(
        "but no other user", IAM + "reference_policies_elements_principal.html", THIRD, "GetObject", False,
        (allow("s3:GetObject", principal=aws(arn_of(OTHER.user_id, OTHER.display_name))),),
    ),
    Case(
        "a canonical id names a user", GUIDE + "s3-bucket-user-policy-specifying-principal-intro.html", OTHER,
        "GetObject", True, (allow("s3:GetObject", principal={"CanonicalUser": OTHER.user_id}),),
    ),
    Case(
        "everybody includes clients without a key", GUIDE + "s3-bucket-user-policy-specifying-principal-intro.html",
        ANONYMOUS, "GetObject", True, (allow("s3:GetObject", principal=aws("*")),),
    ),
    Case(
        "an account does not", GUIDE + "s3-bucket-user-policy-specifying-principal-intro.html", ANONYMOUS, "GetObject",
        False, (allow("s3:GetObject", principal=aws(account_of(OTHER.user_id))),),
    ),
    Case(
        "all but one are denied", IAM + "reference_policies_elements_notprincipal.html", THIRD, "GetObject", False,
        (
            allow("s3:GetObject"),
            {"Effect": "Deny", "NotPrincipal": aws(account_of(OTHER.user_id)), "Action": "s3:*", "Resource": ALL},
        ),
    ),
    Case(
        "and the one is not", IAM + "reference_policies_elements_notprincipal.html", OTHER, "GetObject", True,
        (
            allow("s3:GetObject"),
            {"Effect": "Deny", "NotPrincipal": aws(account_of(OTHER.user_id)), "Action": "s3:*", "Resource": ALL},
        ),
    ),
    # --- NotAction, NotResource
    Case(
        "all actions but one", IAM + "reference_policies_elements_notaction.html", OTHER, "PutObject", True,
        ({"Effect": "Allow", "Principal": "*", "NotAction": "s3:DeleteObject", "Resource": ALL},),
    ),
    Case(
        "and not that one", IAM + "reference_policies_elements_notaction.html", OTHER, "DeleteObject", False,
        ({"Effect": "Allow", "Principal": "*", "NotAction": "s3:DeleteObject", "Resource": ALL},),
    ),
    Case(
        "a deny of all resources but one", IAM + "reference_policies_elements_notresource.html", OWNER, "GetObject",
        False, ({"Effect": "Deny", "Principal": "*", "Action": "s3:*", "NotResource": ITSELF + "/public/*"},),
    ),
    Case("actions are compared without case", IAM + "reference_policies_elements_action.html", OTHER, "GetObject", True,
         (allow("s3:getobject"),)),
    Case("a star in a resource crosses slashes", GUIDE + "s3-arn-format.html", OTHER, "GetObject", True,
         (allow("s3:GetObject", "arn:aws:s3:::bucket/a*"),), key=b"a/b/c"),
    Case("a question mark is one character", GUIDE + "s3-arn-format.html", OTHER, "GetObject", False,
         (allow("s3:GetObject", "arn:aws:s3:::bucket/a?"),), key=b"abc"),
    # --- conditions
    Case("plain HTTP is denied", EXAMPLES, OWNER, "GetObject", False, (TLS_ONLY,), {"aws:securetransport": "false"}),
    Case("HTTPS is not", EXAMPLES, OWNER, "GetObject", True, (TLS_ONLY,), {"aws:securetransport": "true"}),
    Case("another network is denied", EXAMPLES, OWNER, "GetObject", False, (FROM_NETWORK,),
         {"aws:sourceip": "198.51.100.7"}),
    Case("the network is not", EXAMPLES, OWNER, "GetObject", True, (FROM_NETWORK,), {"aws:sourceip": "192.0.2.7"}),
    Case("an upload that gives the bucket's owner full control", EXAMPLES, OTHER, "PutObject", True, (FULL_TO_OWNER,),
         {"s3:x-amz-acl": "bucket-owner-full-control"}),
    Case("one that does not", EXAMPLES, OTHER, "PutObject", False, (FULL_TO_OWNER,)),
    Case("a list of the prefix", KEYS, OTHER, "ListObjectsV2", True, (PREFIX,), {"s3:prefix": "projects"}, key=None),
    Case("of another prefix", KEYS, OTHER, "ListObjectsV2", False, (PREFIX,), {"s3:prefix": "p"}, key=None),
    Case("of all", KEYS, OTHER, "ListObjectsV2", False, (PREFIX,), key=None),
    Case("few keys a page", KEYS, OTHER, "ListObjects", True,
         (allow("s3:ListBucket", ITSELF, Condition={"NumericLessThanEquals": {"s3:max-keys": "10"}}),),
         {"s3:max-keys": "10"}, key=None),
    Case("too many", KEYS, OTHER, "ListObjects", False,
         (allow("s3:ListBucket", ITSELF, Condition={"NumericLessThanEquals": {"s3:max-keys": "10"}}),),
         {"s3:max-keys": "11"}, key=None),
    Case("an object with the tag", GUIDE + "tagging-and-policies.html", OTHER, "GetObject", True, (BY_TAG,),
         {"s3:existingobjecttag/environment": "production"}),
    Case("an object without it", GUIDE + "tagging-and-policies.html", OTHER, "GetObject", False, (BY_TAG,)),
    Case("a missing key fails a condition", OPERATORS, OTHER, "GetObject", False,
         (allow("s3:GetObject", Condition={"StringEquals": {"aws:Referer": "x"}}),)),
    Case("but not with IfExists", OPERATORS, OTHER, "GetObject", True,
         (allow("s3:GetObject", Condition={"StringEqualsIfExists": {"aws:Referer": "x"}}),)),
    Case("which is a condition when the key is there", OPERATORS, OTHER, "GetObject", False,
         (allow("s3:GetObject", Condition={"StringEqualsIfExists": {"aws:Referer": "x"}}),), {"aws:referer": "y"}),
    Case("a negated operator holds for a missing key", OPERATORS, OWNER, "PutObject", False,
         (deny("s3:PutObject", Condition={"StringNotEquals": {"s3:x-amz-server-side-encryption": "aws:kms"}}),)),
    Case("Null true: the key is missing", OPERATORS, OWNER, "PutObject", False,
         (deny("s3:PutObject", Condition={"Null": {"s3:x-amz-server-side-encryption": "true"}}),)),
    Case("Null true does not hold when it is there", OPERATORS, OWNER, "PutObject", True,
         (deny("s3:PutObject", Condition={"Null": {"s3:x-amz-server-side-encryption": "true"}}),),
         {"s3:x-amz-server-side-encryption": "AES256"}),
    Case("several values are alternatives", MANY,
         OTHER, "GetObject", True, (allow("s3:GetObject", Condition={"StringLike": {"aws:Referer": ["a*", "b*"]}}),),
         {"aws:referer": "b1"}),
    Case("several keys must all hold", MANY,
         OTHER, "GetObject", False,
         (allow("s3:GetObject", Condition={"StringLike": {"aws:Referer": "a*", "aws:UserAgent": "b*"}}),),
         {"aws:referer": "a", "aws:useragent": "a"}),
    Case("a date", OPERATORS, OTHER, "GetObject", True,
         (allow("s3:GetObject", Condition={"DateGreaterThan": {"aws:CurrentTime": "2020-01-01T00:00:00Z"}}),),
         {"aws:currenttime": "2026-01-01T00:00:00Z"}),
    Case("one's own folder", VARIABLES, OTHER, "GetObject", True, (HOME,),
         {"aws:username": "b"}, key=b"home/b/x"),
    Case("another's", VARIABLES, OTHER, "GetObject", False, (HOME,),
         {"aws:username": "b"}, key=b"home/c/x"),
    Case("a star in a name is no pattern", VARIABLES, OTHER, "GetObject", False, (HOME,),
         {"aws:username": "*"}, key=b"home/c/x"),
    # --- versions
    Case("a version wants an action of its own", GUIDE + "versioning-workflows.html", OTHER, "GetObject", False,
         (allow("s3:GetObject"),), version="v1"),
    Case("this one", GUIDE + "versioning-workflows.html", OTHER, "GetObject", True, (allow("s3:GetObjectVersion"),),
         version="v1"),
    Case("to delete one as well", GUIDE + "DeletingObjectVersions.html", OTHER, "DeleteObject", False,
         (allow("s3:DeleteObject"),), version="v1"),
    Case("all attributes need both actions",
         "https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObjectAttributes.html", OTHER, "GetObjectAttributes",
         False, (allow("s3:GetObject"),)),
    # --- public access block
    Case("a public policy is cut off", BLOCK, OTHER, "GetObject", False, (allow("s3:GetObject"),),
         block=PublicAccessBlock(restrict=True)),
    Case("for those it names too", BLOCK, OTHER, "GetObject", False,
         (allow("s3:GetObject"), allow("s3:GetObject", principal=aws(account_of(OTHER.user_id)))),
         block=PublicAccessBlock(restrict=True)),
    Case("but not for the owner", BLOCK, OWNER, "GetObject", True, (allow("s3:GetObject"),),
         block=PublicAccessBlock(restrict=True)),
    Case("a policy that is not public is not cut off", BLOCK, OTHER, "GetObject", True,
         (allow("s3:GetObject", principal=aws(account_of(OTHER.user_id))),), block=PublicAccessBlock(restrict=True)),
    Case("nor one for a fixed network", BLOCK, OTHER, "GetObject", True,
         (allow("s3:GetObject", Condition={"IpAddress": {"aws:SourceIp": "192.0.2.0/24"}}),),
         {"aws:sourceip": "192.0.2.1"}, PublicAccessBlock(restrict=True)),
    Case("a public list is ignored", BLOCK, OTHER, "ListObjects", False, block=PublicAccessBlock(ignore_acls=True),
         rule=WRITER, acl=(AclEntry(EVERYBODY, "READ"),), key=None),
    Case("an object's as well", BLOCK, OTHER, "GetObject", False, block=PublicAccessBlock(ignore_acls=True),
         rule=WRITER, found=PUBLIC_OBJECT),
    Case("a grant to one user is not public", BLOCK, OTHER, "ListObjects", True,
         block=PublicAccessBlock(ignore_acls=True), rule=WRITER, acl=(AclEntry(OTHER.user_id, "READ"),), key=None),
    # --- access control lists
    Case("READ of a bucket lists it", LISTS, ANONYMOUS, "ListObjects", True, rule=WRITER,
         acl=(AclEntry(EVERYBODY, "READ"),), key=None),
    Case("and reads no object", LISTS, OTHER, "GetObject", False, rule=WRITER, acl=(AclEntry(EVERYBODY, "READ"),),
         found=MINE),
    Case("WRITE of a bucket creates and overwrites", LISTS, ANONYMOUS, "PutObject", True, rule=WRITER,
         acl=(AclEntry(EVERYBODY, "WRITE"),)),
    Case("and lists nothing", LISTS, OTHER, "ListObjects", False, rule=WRITER, acl=(AclEntry(EVERYBODY, "WRITE"),),
         key=None),
    Case("READ of an object", LISTS, ANONYMOUS, "GetObject", True, rule=WRITER, found=PUBLIC_OBJECT),
    Case("is not READ_ACP", LISTS, OTHER, "GetObjectAcl", False, rule=WRITER, found=PUBLIC_OBJECT),
    Case("all who sign", LISTS, OTHER, "ListObjects", True, rule=WRITER, acl=(AclEntry(SIGNED, "READ"),), key=None),
    Case("are not everybody", LISTS, ANONYMOUS, "ListObjects", False, rule=WRITER, acl=(AclEntry(SIGNED, "READ"),),
         key=None),
    Case("FULL_CONTROL is all of them", LISTS, OTHER, "PutBucketAcl", True, rule=WRITER,
         acl=(AclEntry(OTHER.user_id, "FULL_CONTROL"),), key=None),
    Case("but no list deletes a bucket", LISTS, OTHER, "DeleteBucket", False, rule=WRITER,
         acl=(AclEntry(OTHER.user_id, "FULL_CONTROL"),), key=None),
    Case("a deny in the policy beats a list", LOGIC, OTHER, "ListObjects", False, (deny("s3:ListBucket", ITSELF),),
         rule=WRITER, acl=(AclEntry(EVERYBODY, "READ"),), key=None),
    # --- ownership
    Case("lists mean nothing when the owner is enforced", OWNERSHIP_PAGE, OTHER, "ListObjects", False,
         acl=(AclEntry(EVERYBODY, "READ"),), key=None),
    Case("an object's neither", OWNERSHIP_PAGE, OTHER, "GetObject", False, found=PUBLIC_OBJECT),
    Case("the bucket's owner then owns all objects", OWNERSHIP_PAGE, OWNER, "GetObject", True, found=THEIRS),
    Case("else the writer does", OWNERSHIP_PAGE, OWNER, "GetObject", False, rule=WRITER, found=THEIRS),
    Case("who reads it", OWNERSHIP_PAGE, OTHER, "GetObject", True, rule=WRITER, found=THEIRS),
    Case("and changes its list", OWNERSHIP_PAGE, OTHER, "PutObjectAcl", True, rule=WRITER, found=THEIRS),
    Case("which the bucket's owner does not", OWNERSHIP_PAGE, OWNER, "PutObjectAcl", False, rule=WRITER, found=THEIRS),
    Case("who can delete it", OWNERSHIP_PAGE, OWNER, "DeleteObject", True, rule=WRITER, found=THEIRS),
]  # fmt: skip


def resource_of(case: Case) -> Resource:
    configuration: Configuration = NOTHING.having(OWNERSHIP, Ownership(case.rule))
    if case.policy:
        configuration = configuration.having(POLICY, PolicyText(text(*case.policy)))
    if case.block is not None:
        configuration = configuration.having(PUBLIC_ACCESS_BLOCK, case.block)
    if case.acl is not None:
        configuration = configuration.having(ACL, Acl(case.acl))
    record = BucketRecord("bucket", b"B" * 16, OWNER.user_id, 1, "active", 16, "eu")
    record = msgspec.structs.replace(record, plain=configuration.is_plain(kinds.KINDS))
    return Resource(record, configuration, case.key, case.version)


def facts_of(found: Mapping[str, str]) -> Callable[[str], tuple[str, ...] | None]:
    return lambda name: (found[name],) if name in found else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.what} ({case.operation})")
def test_a_decision_is_as_aws_documents_it(case: Case) -> None:
    resource, context = resource_of(case), Context(facts_of(case.facts), case.found)
    if not case.allowed:
        with pytest.raises(AccessDenied):
            authorize(case.who, action_of(case.operation), resource, context)
        return
    grant = authorize(case.who, action_of(case.operation), resource, context)
    assert (grant.bucket, grant.key, grant.access) == (resource.bucket, case.key, action_of(case.operation).access)


def test_the_policy_of_another_s_bucket_is_405_when_it_is_allowed_and_403_when_not() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetBucketPolicy.html"""
    allowed = Case("", "", OTHER, "GetBucketPolicy", True, (allow("s3:GetBucketPolicy", ITSELF),), key=None)
    with pytest.raises(MethodNotAllowed):
        authorize(OTHER, action_of("GetBucketPolicy"), resource_of(allowed), Context(facts_of({})))
    with pytest.raises(AccessDenied):
        authorize(OTHER, action_of("PutBucketPolicy"), resource_of(allowed), Context(facts_of({})))


def test_a_decision_that_depends_on_the_object_says_so_and_what_is_missing_is_not_kept_from_the_owner() -> None:
    case = Case("", "", OTHER, "GetObject", True, rule=WRITER)
    with pytest.raises(ObjectWanted):
        authorize(OTHER, action_of("GetObject"), resource_of(case), Context(facts_of({})))
    with pytest.raises(ObjectWanted):
        authorize(OWNER, action_of("GetObject"), resource_of(case), Context(facts_of({})))
    with pytest.raises(AccessDenied):
        authorize(OTHER, action_of("GetObject"), resource_of(case), Context(facts_of({}), None))
    authorize(OWNER, action_of("GetObject"), resource_of(case), Context(facts_of({}), None))


def test_a_grant_names_the_object_that_gave_it() -> None:
    case = Case("", "", OTHER, "GetObject", True, rule=WRITER, found=PUBLIC_OBJECT)
    grant = authorize(OTHER, action_of("GetObject"), resource_of(case), Context(facts_of({}), PUBLIC_OBJECT))
    assert grant.found == PUBLIC_OBJECT


def test_every_operation_with_a_row_of_its_own_is_routed_and_all_others_are_named_after_themselves() -> None:
    routed = {
        row.name
        for table in (BUCKET, OBJECT)
        for methods in table.values()
        for operation in methods.values()
        for row in (operation, operation.copy, operation.unnamed)
        if row is not None
    }
    assert ACTIONS.keys() <= routed | {"PostObject"}
    assert action_of("GetBucketLogging") == Action(("s3:GetBucketLogging",))


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"Statement": []}',
        b'{"Version": "2020-01-01", "Statement": [{}]}',
        b'{"Statement": [{}], "Statement": [{}]}',
        b"[" * 5000,
        b'{"Id": NaN}',
        text(allow("s3:GetObject")).replace("Allow", "allow").encode(),
        text(allow("s3:GetObject") | {"Extra": 1}).encode(),
        text(allow("s3:GetObject") | {"NotAction": "s3:*"}).encode(),
        text(allow("ec2:RunInstances")).encode(),
        text(allow("GetObject")).encode(),
        text(allow([])).encode(),
        text(allow("s3:GetObject", "arn:aws:s3:::other/*")).encode(),
        text(allow("s3:GetObject", "bucket/*")).encode(),
        text(allow("s3:GetObject", principal={"AWS": "nobody"})).encode(),
        text(allow("s3:GetObject", principal={"AWS": "arn:aws:s3:::x"})).encode(),
        text(allow("s3:GetObject", principal={})).encode(),
        text(allow("s3:GetObject", principal="me")).encode(),
        text({"Effect": "Allow", "NotPrincipal": {"AWS": "*"}, "Action": "s3:*", "Resource": ALL}).encode(),
        text(allow("s3:GetObject", Condition={"StringIs": {"aws:Referer": "x"}})).encode(),
        text(allow("s3:GetObject", Condition={"StringEquals": {"aws:Unknown": "x"}})).encode(),
        text(allow("s3:GetObject", Condition={"StringEquals": {"s3:ExistingObjectTag/": "x"}})).encode(),
        text(allow("s3:GetObject", Condition={"IpAddress": {"aws:SourceIp": "everywhere"}})).encode(),
        text(allow("s3:GetObject", Condition={"NumericEquals": {"s3:max-keys": "many"}})).encode(),
        text(allow("s3:GetObject", Condition={"NullIfExists": {"aws:Referer": "true"}})).encode(),
        text(allow("s3:GetObject", Condition={"Bool": []})).encode(),
        text(allow("s3:GetObject", Sid="a"), allow("s3:GetObject", Sid="a")).encode(),
        text(allow("s3:GetObject", "arn:aws:s3:::bucket/" + "x" * 20480)).encode(),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(document: bytes) -> None:
    with pytest.raises(MalformedPolicy):
        parse(document, "bucket")


@pytest.mark.parametrize(
    ("found", "public"),
    [
        (allow("s3:GetObject"), True),
        (allow("s3:GetObject", principal=aws("*")), True),
        (deny("s3:GetObject"), False),
        (allow("s3:GetObject", principal=aws("123456789012")), False),
        (allow("s3:GetObject", Condition={"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}), False),
        (allow("s3:GetObject", Condition={"IpAddress": {"aws:SourceIp": "0.0.0.0/1"}}), True),
        (allow("s3:GetObject", Condition={"NotIpAddress": {"aws:SourceIp": "10.0.0.0/8"}}), True),
        (allow("s3:GetObject", Condition={"StringEquals": {"aws:PrincipalAccount": "123456789012"}}), False),
        (allow("s3:GetObject", Condition={"StringLike": {"aws:PrincipalAccount": "1*"}}), True),
        (allow("s3:GetObject", Condition={"StringEquals": {"aws:Referer": "x"}}), True),
        (allow("s3:GetObject", Condition={"StringEqualsIfExists": {"aws:SourceVpc": "x"}}), True),
    ],
)
def test_public_means_what_aws_means_by_it(found: dict[str, Any], public: bool) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-control-block-public-access.html"""
    assert parse(text(found).encode()).public is public


@pytest.mark.parametrize(
    ("pattern", "value", "holds"),
    [
        ("*" + "a" * 8000 + "b", "a" * 16000, False),
        ("*" + "a?" * 4000 + "b", "a" * 16000, False),
        ("*a" * 9000 + "b", "a" * 16000, False),
        ("*a?*" * 4000, "a" * 16000, True),
        ("${aws:useragent}*" * 1000, "a" * 16000, False),
    ],
    ids=["run", "any", "stars", "both", "variables"],
)
def test_no_pattern_keeps_other_requests_waiting(pattern: str, value: str, holds: bool) -> None:
    """The first of them took more than a minute, on the event loop."""
    policy = parse(text(deny("s3:*", Condition={"StringLike": {"aws:Referer": pattern}})).encode())
    facts = facts_of({"aws:referer": value, "aws:useragent": "a" * 1000})
    began = time.process_time()
    found = policy.verdict(ANONYMOUS, "s3:GetObject", "arn:aws:s3:::bucket/k", facts)
    assert time.process_time() - began < 10
    assert (found is False) is holds


def test_the_tag_in_a_variable_keeps_its_case() -> None:
    mine = deny("s3:*", Condition={"StringEquals": {"aws:username": "${s3:ExistingObjectTag/Owner}"}})
    facts = facts_of({"aws:username": "b", "s3:existingobjecttag/Owner": "b"})
    assert parse(text(mine).encode()).verdict(OTHER, "s3:GetObject", "arn:aws:s3:::bucket/k", facts) is False


def test_a_principal_with_a_wildcard_which_would_name_nobody_is_refused() -> None:
    """https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_principal.html: a wildcard is no
    part of a name there."""
    for name in ("*", "a*", "a?"):
        with pytest.raises(MalformedPolicy):
            parse(text(deny("s3:*", principal=aws(f"arn:aws:iam::123456789012:user/{name}"))).encode())


def test_a_list_lets_no_other_user_delete_a_version() -> None:
    case = Case("", "", OTHER, "DeleteObject", True, rule=WRITER, acl=(AclEntry(EVERYBODY, "WRITE"),))
    authorize(OTHER, action_of("DeleteObject"), resource_of(case), Context(facts_of({})))
    with pytest.raises(AccessDenied):
        authorize(OTHER, action_of("DeleteObject"), resource_of(case._replace(version="v")), Context(facts_of({})))
