"""Decisions about users of an account, roles and sessions, against what AWS's documentation says, each with its source;
and the policies that IAM refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import pytest

from storaged.errors import AccessDenied, LimitExceeded, MalformedPolicyDocument, MethodNotAllowed
from storaged.objects.accounts import IamGroup, IamRole, IamUser, StoredAccount, StoredSession, iam_arn, session_arn
from storaged.objects.api import Identity, ObjectAccess, Principal
from storaged.objects.configuration.access import EVERYBODY, WRITER, AclEntry
from storaged.objects.identities import identity_of_role, identity_of_root, identity_of_user
from storaged.objects.identity import account_of
from storaged.s3.auth.actions import action_of
from storaged.s3.auth.authorize import UNKNOWN, Context, Unknown, authorize
from storaged.s3.auth.policy import IDENTITY, TRUST, check_document
from tests.unit.test_s3_authorize import (
    ALL,
    ITSELF,
    LOGIC,
    OTHER,
    OWNER,
    Case,
    allow,
    aws,
    deny,
    facts_of,
    resource_of,
)

IAM = "https://docs.aws.amazon.com/IAM/latest/UserGuide/"
SINGLE = IAM + "reference_policies_evaluation-logic_policy-eval-denyallow.html"
CROSS = IAM + "reference_policies_evaluation-logic-cross-account.html"
PRINCIPAL = IAM + "reference_policies_elements_principal.html"
NOT_PRINCIPAL = IAM + "reference_policies_elements_notprincipal.html"
SESSIONS = IAM + "access_policies.html#policies_session"
ROOT = IAM + "id_root-user.html"

USER_ARN = iam_arn(OWNER.user_id, "user", "/team/", "bob")
ROLE_ARN = iam_arn(OWNER.user_id, "role", "/", "reader")
SESSION_ARN = session_arn(OWNER.user_id, "reader", "now")
THEIR_ARN = iam_arn(OTHER.user_id, "user", "/", "eve")
ACCOUNT = aws(account_of(OWNER.user_id))
THEIRS = aws(account_of(OTHER.user_id))


def document(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def may(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def may_not(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Deny", "Action": action, "Resource": resource, **more}


def user(*statements: dict[str, Any], of: Principal = OWNER) -> Principal:
    name, path = ("bob", "/team/") if of is OWNER else ("eve", "/")
    inline = {"own": document(*statements)} if statements else {}
    found = IamUser(name, "AIDA1", path, 1, inline)
    return Principal(
        of.user_id, of.display_name, "AKUSER", identity=identity_of_user(of.user_id, StoredAccount(), found)
    )


def session(*statements: dict[str, Any], narrowed: tuple[dict[str, Any], ...] = ()) -> Principal:
    """Of the role ``reader``, with what the role allows, and what its session policy does."""
    role = IamRole("reader", "AROA1", "/", 1, "", {"own": document(*statements)} if statements else {})
    made = StoredSession(1, "ASIA1", "", "AKUSER", OWNER.user_id, 1, 2, role.id, "now")
    identity = identity_of_role(OWNER.user_id, StoredAccount(), role, made)
    texts = (document(*narrowed),) if narrowed else ()
    identity = msgspec.structs.replace(identity, session=texts, issuer="AKUSER")
    return Principal(OWNER.user_id, OWNER.display_name, "ASIA1", identity=identity)


class Decision(NamedTuple):
    what: str
    source: str
    who: Principal
    operation: str
    allowed: bool
    policy: tuple[dict[str, Any], ...] = ()
    key: bytes | None = b"key"
    acl: tuple[AclEntry, ...] | None = None
    found: ObjectAccess | Unknown | None = UNKNOWN
    facts: Mapping[str, str] = {}


READ = may("s3:GetObject", ALL)
GRANTS_THEM = (AclEntry(OTHER.user_id, "READ"),)
BY_TAG = may("s3:GetObject", Condition={"StringEquals": {"s3:ExistingObjectTag/open": "yes"}})
HOME = may("s3:GetObject", ITSELF + "/${aws:username}/*")

DECISIONS = [
    # --- within the account
    Decision("a user without policies may nothing", SINGLE, user(), "GetObject", False),
    Decision("what its policy allows it may", SINGLE, user(READ), "GetObject", True),
    Decision("and nothing else", SINGLE, user(READ), "PutObject", False),
    Decision("on nothing else", SINGLE, user(may("s3:GetObject", ITSELF + "/other")), "GetObject", False),
    Decision("a deny of its own ends it", LOGIC, user(READ, may_not("s3:*")), "GetObject", False),
    Decision("a deny of the bucket does", LOGIC, user(READ), "GetObject", False, (deny("s3:GetObject"),)),
    Decision("the bucket's allow does not undo its own deny", LOGIC, user(may_not("s3:Get*")), "GetObject", False,
             (allow("s3:GetObject", principal=aws(USER_ARN)),)),
    Decision("the bucket names the user itself: that is enough", SINGLE, user(), "GetObject", True,
             (allow("s3:GetObject", principal=aws(USER_ARN)),)),
    Decision("another user is not it", SINGLE, user(), "GetObject", False,
             (allow("s3:GetObject", principal=aws(iam_arn(OWNER.user_id, "user", "/", "bob"))),)),
    Decision("the bucket names everybody: that is enough", PRINCIPAL, user(), "GetObject", True,
             (allow("s3:GetObject"),)),
    Decision("the bucket names the account: the account must allow it too", PRINCIPAL, user(), "GetObject", False,
             (allow("s3:GetObject", principal=ACCOUNT),)),
    Decision("which it does", PRINCIPAL, user(READ), "GetObject", True,
             (allow("s3:GetObject", principal=ACCOUNT),)),
    Decision("a deny of the account denies its users", PRINCIPAL, user(READ), "GetObject", False,
             (deny("s3:GetObject", principal=ACCOUNT),)),
    Decision("all but the user, if the account is named too", NOT_PRINCIPAL, user(READ), "GetObject", True,
             ({"Effect": "Deny", "NotPrincipal": aws(USER_ARN, account_of(OWNER.user_id)), "Action": "s3:*",
               "Resource": ALL},)),
    Decision("the account alone does not exempt its users", NOT_PRINCIPAL, user(READ), "GetObject", False,
             ({"Effect": "Deny", "NotPrincipal": ACCOUNT, "Action": "s3:*", "Resource": ALL},)),
    Decision("nor does the user alone", NOT_PRINCIPAL, user(READ), "GetObject", False,
             ({"Effect": "Deny", "NotPrincipal": aws(USER_ARN), "Action": "s3:*", "Resource": ALL},)),
    Decision("the root is not limited by policies of users", ROOT, OWNER, "GetObject", True),
    Decision("only the root gets at a policy that denies all", ROOT, user(may("s3:*")), "GetBucketPolicy", False,
             (deny("s3:*", [ITSELF, ALL]),), key=None),
    Decision("a user may change the bucket's settings by its policy", SINGLE, user(may("s3:PutBucketPolicy")),
             "PutBucketPolicy", True, key=None),
    Decision("NotAction allows what it does not name", SINGLE,
             user({"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"}), "GetObject", True),
    Decision("a variable names the user", IAM + "reference_policies_variables.html", user(HOME), "GetObject", True,
             key=b"bob/x", facts={"aws:username": "bob"}),
    Decision("and not another one", IAM + "reference_policies_variables.html", user(HOME), "GetObject", False,
             key=b"eve/x", facts={"aws:username": "bob"}),
    Decision("a key of another service is never there", IAM + "reference_policies_condition-keys.html",
             user(may("s3:GetObject", Condition={"StringEquals": {"ec2:Region": "eu"}})), "GetObject", False),
    # --- objects of another account in the account's bucket
    Decision("the account's policies do not open an object of another account", SINGLE, user(may("s3:*")), "GetObject",
             False, acl=(), found=ObjectAccess(OTHER.user_id, None, {})),
    # --- across accounts
    Decision("another account's user needs both: its own policy", CROSS, user(READ, of=OTHER), "GetObject", False),
    Decision("and the bucket's", CROSS, user(of=OTHER), "GetObject", False,
             (allow("s3:GetObject", principal=aws(THEIR_ARN)),)),
    Decision("both allow it", CROSS, user(READ, of=OTHER), "GetObject", True,
             (allow("s3:GetObject", principal=aws(THEIR_ARN)),)),
    Decision("the bucket may name the account", CROSS, user(READ, of=OTHER), "GetObject", True,
             (allow("s3:GetObject", principal=THEIRS),)),
    Decision("or everybody", CROSS, user(READ, of=OTHER), "GetObject", True, (allow("s3:GetObject"),)),
    Decision("also then its own policy is needed", CROSS, user(of=OTHER), "GetObject", False,
             (allow("s3:GetObject"),)),
    Decision("and its own deny holds", CROSS, user(may_not("s3:*"), of=OTHER), "GetObject", False,
             (allow("s3:GetObject"),)),
    Decision("a list names the account: its own policy is needed", CROSS, user(of=OTHER), "ListObjects", False,
             key=None, acl=GRANTS_THEM),
    Decision("and enough then", CROSS, user(may("s3:ListBucket"), of=OTHER), "ListObjects", True,
             key=None, acl=GRANTS_THEM),
    Decision("a list for everybody as well", CROSS, user(of=OTHER), "ListObjects", False, key=None,
             acl=(AclEntry(EVERYBODY, "READ"),)),
    # --- roles and sessions
    Decision("a role has what its policies allow", SESSIONS, session(READ), "GetObject", True),
    Decision("and nothing else", SESSIONS, session(READ), "PutObject", False),
    Decision("a session policy gives nothing", SESSIONS, session(narrowed=(READ,)), "GetObject", False),
    Decision("both allow it", SESSIONS, session(may("s3:*"), narrowed=(READ,)), "GetObject", True),
    Decision("it narrows", SESSIONS, session(may("s3:*"), narrowed=(READ,)), "PutObject", False),
    Decision("its deny ends it", SESSIONS, session(READ, narrowed=(may("s3:*"), may_not("s3:GetObject"))), "GetObject",
             False),
    Decision("the bucket names the role: added before the session's policy narrows", SESSIONS, session(), "GetObject",
             True, (allow("s3:GetObject", principal=aws(ROLE_ARN)),)),
    Decision("which it does", SESSIONS, session(narrowed=(may("s3:PutObject"),)), "GetObject", False,
             (allow("s3:GetObject", principal=aws(ROLE_ARN)),)),
    Decision("the bucket names the session: the session's policy does not narrow that", SESSIONS,
             session(narrowed=(may("s3:PutObject"),)), "GetObject", True,
             (allow("s3:GetObject", principal=aws(SESSION_ARN)),)),
    Decision("unless it denies it", SESSIONS, session(narrowed=(may_not("s3:GetObject"),)), "GetObject", False,
             (allow("s3:GetObject", principal=aws(SESSION_ARN)),)),
    Decision("another session of the role is not named", SESSIONS, session(), "GetObject", False,
             (allow("s3:GetObject", principal=aws(session_arn(OWNER.user_id, "reader", "then"))),)),
    Decision("a deny of the role ends it", PRINCIPAL, session(READ), "GetObject", False,
             (deny("s3:GetObject", principal=aws(ROLE_ARN)),)),
]  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS, ids=lambda case: f"{case.what} ({case.operation})")
def test_a_decision_about_a_user_or_a_session_is_as_aws_documents_it(case: Decision) -> None:
    rule = {"rule": WRITER} if case.acl is not None else {}
    resource = resource_of(
        Case(
            case.what,
            case.source,
            case.who,
            case.operation,
            case.allowed,
            case.policy,
            acl=case.acl,
            key=case.key,
            **rule,
        )
    )
    context = Context(facts_of(case.facts), case.found)
    if case.allowed:
        assert authorize(case.who, action_of(case.operation), resource, context).key == case.key
    else:
        with pytest.raises(AccessDenied):
            authorize(case.who, action_of(case.operation), resource, context)


def test_a_user_of_another_account_who_may_read_a_policy_is_told_405_as_its_root_would_be() -> None:
    who = user(may("s3:*"), of=OTHER)
    policy = (allow("s3:GetBucketPolicy", ITSELF, THEIRS),)
    resource = resource_of(Case("", "", who, "GetBucketPolicy", False, policy, key=None))
    with pytest.raises(MethodNotAllowed):
        authorize(who, action_of("GetBucketPolicy"), resource, Context(facts_of({})))


def test_a_session_of_the_root_may_what_the_root_may() -> None:
    identity = msgspec.structs.replace(identity_of_root(OWNER.user_id), issuer=OWNER.access_key)
    who = Principal(OWNER.user_id, OWNER.display_name, "ASIA", identity=identity)
    resource = resource_of(Case("", "", who, "GetObject", True))
    assert authorize(who, action_of("GetObject"), resource, Context(facts_of({}))).key == b"key"
    denied = resource_of(Case("", "", who, "GetBucketPolicy", True, (deny("s3:*", [ITSELF, ALL]),), key=None))
    assert authorize(who, action_of("GetBucketPolicy"), denied, Context(facts_of({}))).key is None


def test_a_user_has_the_policies_of_its_groups_and_those_that_are_attached_anywhere() -> None:
    group = IamGroup("team", "AGPA1", "/", 1, {"a": document(may("s3:PutObject"))}, (
        "arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess",
    ))  # fmt: skip
    other = IamGroup("other", "AGPA2", "/", 1, {"b": document(may("s3:*"))})
    found = IamUser("bob", "AIDA1", "/", 1, groups=("AGPA1", "AGPAgone"))
    account = StoredAccount(users={"bob": found}, groups={"team": group, "other": other})
    identity = identity_of_user(OWNER.user_id, account, found)
    assert len(identity.documents) == 2
    who = Principal(OWNER.user_id, "a", "AK", identity=identity)
    for operation, allowed in (("PutObject", True), ("GetObject", True), ("DeleteObject", False)):
        resource = resource_of(Case("", "", who, operation, allowed))
        if allowed:
            authorize(who, action_of(operation), resource, Context(facts_of({})))
        else:
            with pytest.raises(AccessDenied):
                authorize(who, action_of(operation), resource, Context(facts_of({})))


MALFORMED = [
    "", "{", "[]", "null", '"x"', "{}", '{"Version": "2012-10-17"}', '{"Version": "2010-10-17", "Statement": []}',
    document(),
    document(may("s3:GetObject") | {"Principal": "*"}),
    document(may("GetObject")),
    document(may("s3:Get Object")),
    document(may([])),
    document(may("s3:*", "bucket")),
    document(may("s3:*", "arn:aws:s3")),
    document(may("s3:*", [])),
    document({"Effect": "Allow", "Action": "s3:*"}),
    document({"Effect": "Permit", "Action": "s3:*", "Resource": "*"}),
    document(may("s3:*") | {"Sid": "with space"}),
    document(may("s3:*") | {"Sid": "a"}, may("s3:*") | {"Sid": "a"}),
    document(may("s3:*") | {"Extra": 1}),
    document(may("s3:*", Condition={"StringMatches": {"aws:username": "x"}})),
    document(may("s3:*", Condition={"StringEquals": {"s3:NoSuchKey": "x"}})),
    document(may("s3:*", Condition={"StringEquals": {"nocolon": "x"}})),
    document(may("s3:*", Condition={"IpAddress": {"aws:SourceIp": "everywhere"}})),
    '{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Effect": "Deny", "Action": "*", "Resource": "*"}}',
    '{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "\\ud800", "Resource": "*"}}',
    "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_policy_that_iam_does_not_understand_is_refused(text: str) -> None:
    with pytest.raises(MalformedPolicyDocument):
        check_document(text, IDENTITY, 2048, "user bob")


def test_what_other_services_call_theirs_may_stand_in_a_policy_and_white_space_does_not_count() -> None:
    text = document(may(["ec2:Describe*", "s3:Get*"], ["arn:aws:ec2:eu:1:instance/*", "arn:aws:s3:::b/*"],
                        Condition={"StringEquals": {"ec2:Region": "eu"}}))  # fmt: skip
    check_document(text + " " * 5000, IDENTITY, 2048, "user bob")
    with pytest.raises(LimitExceeded):
        check_document(document(may("s3:GetObject", "arn:aws:s3:::" + "b" * 2048)), IDENTITY, 2048, "user bob")


def trusts(**more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Principal": aws(USER_ARN), "Action": "sts:AssumeRole"} | more


@pytest.mark.parametrize(
    "statement",
    [
        {"Effect": "Allow", "Action": "sts:AssumeRole"},
        trusts(Resource="*"),
        trusts(Action="s3:GetObject"),
        trusts(Principal={"AWS": "arn:aws:iam::123456789012:user/*"}),
        trusts(Principal={"AWS": "bob"}),
    ],
    ids=range(5),
)
def test_a_trust_policy_names_who_may_assume_and_nothing_else(statement: dict[str, Any]) -> None:
    check_document(document(trusts()), TRUST, 2048, "role")
    with pytest.raises(MalformedPolicyDocument):
        check_document(document(statement), TRUST, 2048, "role")


def test_an_identity_that_is_not_temporary_says_so() -> None:
    assert not Identity("AIDA1", USER_ARN).temporary
    assert Identity("AIDA1", USER_ARN, issuer="AK").temporary


def test_a_policy_that_many_groups_attach_is_asked_once() -> None:
    arn = "arn:aws:iam::aws:policy/AmazonS3FullAccess"
    groups = {f"g{n}": IamGroup(f"g{n}", f"AGPA{n}", "/", 1, attached=(arn,)) for n in range(10)}
    user = IamUser("bob", "AIDA1", "/", 1, attached=(arn,), groups=tuple(group.id for group in groups.values()))
    identity = identity_of_user(OWNER.user_id, StoredAccount(users={"bob": user}, groups=groups), user)
    assert len(identity.documents) == 1
