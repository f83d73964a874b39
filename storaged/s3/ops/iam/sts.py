"""Temporary credentials: AssumeRole, GetSessionToken, GetCallerIdentity.

https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html, API_GetSessionToken.html,
API_GetCallerIdentity.html
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from storaged.errors import AccessDenied, PackedPolicyTooLarge, ValidationError
from storaged.ids import Entropy
from storaged.objects.accounts import SESSION_FORMAT, IamRole, StoredAccount, StoredSession, iam_arn, session_arn
from storaged.objects.api import Principal, Users
from storaged.objects.identities import managed_text
from storaged.objects.identity import account_of
from storaged.s3.auth.conditions import Facts
from storaged.s3.auth.facts import resource_tags
from storaged.s3.auth.identities import asked
from storaged.s3.auth.policy import IDENTITY, check_document, trust_policy_of
from storaged.s3.auth.principals import caller_arn, caller_id, own_names
from storaged.s3.ops.iam.call import Parameters, Result, moment
from storaged.s3.ops.iam.principals import user_id_of
from storaged.s3.ops.iam.users import root_of

SECONDS_MIN: Final = 900
CHAINED_S_MAX: Final = 3600
POLICIES_CHARS_MAX: Final = 2048
_ROLE_ARN = re.compile(r"arn:aws:iam::(\d{12}):role(/(?:[\x21-\x7e]+/)?)([\w+=,.@-]{1,64})")

NOT_SUPPORTED: Final = (
    "Tags.member.",
    "TransitiveTagKeys.member.",
    "SerialNumber",
    "TokenCode",
    "SourceIdentity",
    "ProvidedContexts.member.",
)
"""Parameters, or how they begin."""


class StsCall:
    """``facts(own)``: of the request, with these keys of STS."""

    def __init__(
        self,
        users: Users,
        who: Principal,
        parameters: Parameters,
        now_ms: int,
        entropy: Entropy,
        facts: Callable[[Mapping[str, str]], Facts],
    ) -> None:
        self.users = users
        self.who = who
        self.parameters = parameters
        self.now_ms = now_ms
        self.entropy = entropy
        self.facts = facts
        for name in parameters.found:
            if name.startswith(NOT_SUPPORTED):
                raise ValidationError(f"{name.partition('.')[0]} is not supported.")

    def issued(self, seconds: int, account: str, **more: Any) -> tuple[StoredSession, dict[str, str]]:
        """A session of the caller's key, and the credentials that are answered."""
        session = StoredSession(
            SESSION_FORMAT,
            self.users.accounts.new_id("ASIA"),
            base64.b64encode(self.entropy(30)).decode(),
            (self.who.identity.issuer if self.who.identity is not None else "") or self.who.access_key,
            account,
            self.now_ms,
            self.now_ms + 1000 * seconds,
            **more,
        )
        return session, {
            "AccessKeyId": session.access_key,
            "SecretAccessKey": session.secret_key,
            "SessionToken": self.users.seal_session(session),
            "Expiration": moment(session.expires_ms),
        }


async def get_caller_identity(call: StsCall) -> Result:
    """Needs no permission."""
    who = call.who
    return {"UserId": caller_id(who), "Account": account_of(who.user_id), "Arn": caller_arn(who)}


async def get_session_token(call: StsCall) -> Result:
    """Needs no permission, and a long-term key. The root's sessions last an hour at most."""
    who = call.who
    if who.identity is not None and who.identity.temporary:
        raise AccessDenied("Cannot call GetSessionToken with session credentials")
    most = 3600 if root_of(who) else 129_600
    seconds = call.parameters.integer("DurationSeconds", min(43_200, most), SECONDS_MIN, 129_600)
    _, credentials = call.issued(min(seconds, most), who.user_id)
    return {"Credentials": credentials}


async def assume_role(call: StsCall) -> Result:
    parameters = call.parameters
    arn = parameters.text("RoleArn", chars_max=2048, chars_min=20)
    name = parameters.name("RoleSessionName", chars_max=64, chars_min=2)
    external_id = parameters.text("ExternalId", "", chars_max=1224)
    own = {"sts:rolesessionname": name} | ({"sts:externalid": external_id} if external_id else {})
    denied = AccessDenied(
        f"User: {caller_arn(call.who)} is not authorized to perform: sts:AssumeRole on resource: {arn}"
    )
    if root_of(call.who):
        raise AccessDenied("Roles may not be assumed by root accounts.")
    user_id, account, role = await _role_of(call.users, arn)
    if role is None or not _may_assume(call, user_id, role, arn, call.facts(own | resource_tags(role.tags))):
        raise denied
    chained = call.who.identity is not None and bool(call.who.identity.role)
    most = CHAINED_S_MAX if chained else role.session_s_max
    seconds = parameters.integer("DurationSeconds", min(3600, most), SECONDS_MIN, 43_200)
    if seconds > most:
        raise ValidationError("The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
    policies = _session_policies(parameters, user_id, account)
    session, credentials = call.issued(seconds, user_id, role=role.id, name=name, policies=policies)
    assumed = {"AssumedRoleId": f"{role.id}:{name}", "Arn": session_arn(user_id, role.name, name)}
    found: dict[str, Any] = {"Credentials": credentials, "AssumedRoleUser": assumed}
    if policies:
        found["PackedPolicySize"] = 100 * sum(map(len, session.policies)) // POLICIES_CHARS_MAX
    return found


async def _role_of(users: Users, arn: str) -> tuple[str, StoredAccount | None, IamRole | None]:
    """The account's canonical id, the account, and the role; None when there is none."""
    match = _ROLE_ARN.fullmatch(arn)
    user_id = await user_id_of(users, match[1]) if match is not None else ""
    if match is None or not user_id:
        return "", None, None
    account = await users.accounts.get(user_id)
    role = account.roles.get(match[3].lower())
    if role is None or account.closed or iam_arn(user_id, "role", role.path, role.name) != arn:
        return user_id, account, None
    return user_id, account, role


def _may_assume(call: StsCall, user_id: str, role: IamRole, arn: str, facts: Facts) -> bool:
    """The trust policy is the role's resource policy: within an account it is enough when it names the caller itself,
    across accounts the caller's own policies must allow it, too."""
    who, trust = call.who, trust_policy_of(role.trust)
    assert who.identity is not None
    voice = asked(who, who.identity, "sts:AssumeRole", arn, facts)
    verdict = trust.verdict(who, "sts:AssumeRole", arn, facts)
    if verdict is not True or voice.denied:
        return False
    if voice.permits:
        return True
    return (
        who.user_id == user_id
        and voice.unbounded
        and (
            trust.names_directly(own_names(who), "sts:AssumeRole", arn, facts)
            or trust.names_everybody("sts:AssumeRole", arn, facts)
        )
    )


def _session_policies(parameters: Parameters, user_id: str, account: StoredAccount | None) -> tuple[str, ...]:
    """The texts that narrow a session. Raises MalformedPolicyDocument, PackedPolicyTooLarge, ValidationError."""
    found = []
    if "Policy" in parameters:
        text = parameters.text("Policy", chars_max=POLICIES_CHARS_MAX, chars_min=1)
        check_document(text, IDENTITY, POLICIES_CHARS_MAX, "the session")
        found.append(text)
    arns = parameters.members("PolicyArns", ".arn")
    if len(arns) != sum(name.startswith("PolicyArns.") for name in parameters.found):
        raise ValidationError("PolicyArns is a list of PolicyArns.member.N.arn, numbered from 1.")  # none is overlooked
    for arn in arns:
        managed = managed_text(user_id, account, arn) if account is not None else None
        if managed is None:
            raise ValidationError(f"The specified policy {arn[:200]} does not exist.")
        found.append(managed)
    if sum(map(len, found)) > POLICIES_CHARS_MAX:
        raise PackedPolicyTooLarge()
    return tuple(found)
