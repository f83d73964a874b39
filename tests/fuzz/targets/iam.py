"""The query API of IAM and STS, and the tokens of temporary credentials."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import parse_qsl, quote

from storaged.errors import AccessDenied, S3Error
from storaged.objects.accounts import SESSION_FORMAT, StoredSession
from storaged.objects.ports import SealBroken
from storaged.objects.system.sessions import CONTEXT, Sessions
from storaged.s3.ops.iam import call as iam_call
from storaged.s3.ops.iam import query
from storaged.s3.ops.iam.actions import ACTIONS, perform
from storaged.s3.ops.iam.call import Parameters
from storaged.s3.request import Request
from storaged.wire import encode
from tests.doubles.keys import MemoryKeys
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, refused
from tests.property.agreement import finished
from tests.property.test_iam_calls import POLICY, TRUSTS, Users, call_of


def iam(data: bytes) -> None:
    """A body is refused, or read as a form that the standard library reads the same. A call has a well-formed answer,
    or the error of AWS. A refused call changes nothing, and neither does a call that lists or gets. Nothing is done or
    answered before permission was asked. An account can always be stored and read again."""
    users = Users()
    for body in data.split(b"\n")[:4]:
        request = Request("1", "POST", b"/", "", False, {"content-type": "application/x-www-form-urlencoded"})
        found = refused(lambda body=body, request=request: query._parameters(request, body))  # type: ignore[misc]
        if isinstance(found, S3Error):
            continue
        assert found.found == dict(parse_qsl(body.decode("ascii"), keep_blank_values=True))
        _called(users, found)


def _called(users: Users, parameters: Parameters) -> None:
    action = refused(lambda: parameters.text("Action", chars_max=128, chars_min=1))
    if isinstance(action, S3Error):
        return
    asked: list[str] = []

    def permit(name: str, arn: str) -> None:
        asked.append(name)

    def refuse(name: str, arn: str) -> None:
        raise AccessDenied

    before = users.held
    denied = refused(lambda: finished(perform(call_of(users, action, parameters.found, refuse))))
    assert isinstance(denied, S3Error), "it is done without permission"
    assert users.held == before
    answer = refused(lambda: finished(perform(call_of(users, action, parameters.found, permit))))
    if isinstance(answer, S3Error):
        assert users.held == before, "what is refused changes something"
        return
    assert f"iam:{action}" in asked
    query._answer(query.IAM, action, answer, "1").body.decode()
    if action.startswith(("Get", "List")):
        assert users.held == before, "a read changes something"


class _Plane:
    """As much of an object plane as tokens need."""

    def __init__(self) -> None:
        self.keys = MemoryKeys()


def _sessions() -> Sessions:
    found = object.__new__(Sessions)
    found._plane = _Plane()  # type: ignore[assignment]
    return found


SESSION = StoredSession(SESSION_FORMAT, "ASIA1", "secret", "AKMAIN", "a" * 64, 1, 2)


def token(data: bytes) -> None:
    """A token gives a session that this cluster has sealed, or InvalidToken: no change of a bit, of the length or of
    the base64 makes another session of it."""
    sessions, choices = _sessions(), Choices(data)
    at, bit, text = choices.number(4096), choices.number(8), choices.rest()
    assert isinstance(refused(lambda: sessions.open(text.decode("latin-1"))), S3Error)
    assert isinstance(refused(lambda: sessions.open(base64.b64encode(text).decode())), S3Error)
    sealed = sessions._plane.keys.seal_secret(encode(SESSION), CONTEXT)
    right = base64.b64encode(sealed).decode()
    assert sessions.open(right) == SESSION
    at %= len(sealed)
    changed = sealed[:at] + bytes((sealed[at] ^ 1 << bit,)) + sealed[at + 1 :]
    for wrong in (changed, sealed[:at], sealed + text, text + sealed if text else b""):
        found = refused(lambda wrong=wrong: sessions.open(base64.b64encode(wrong).decode()))  # type: ignore[misc]
        assert isinstance(found, S3Error) or wrong == sealed, "a changed token is taken"
    foreign = sessions._plane.keys.seal_secret(text, CONTEXT)
    refused(lambda: sessions.open(base64.b64encode(foreign).decode()))


_NAMES = (
    b"UserName=u",
    b"GroupName=g",
    b"RoleName=r",
    b"PolicyName=p",
    b"NewUserName=v",
    b"Path=/a/",
    b"NewPath=/b/",
    b"PathPrefix=/a",
    b"PolicyDocument=" + quote(POLICY).encode(),
    b"AssumeRolePolicyDocument=" + quote(TRUSTS).encode(),
    b"PolicyArn=arn:aws:iam::aws:policy/IAMFullAccess",
    b"AccessKeyId=AKIA1",
    b"Status=Inactive",
    b"VersionId=v1",
    b"SetAsDefault=true",
    b"Marker=dQ==",
    b"MaxItems=1",
    b"MaxSessionDuration=3600",
    b"Tags.member.1.Key=k",
    b"Tags.member.1.Value=v",
    b"TagKeys.member.1=k",
    b"Scope=All",
    b"OnlyAttached=true",
    b"Description=d",
)
_CALLS = tuple(b"Action=" + name.encode() for name in sorted(ACTIONS))

TARGETS = (
    Target(
        "iam",
        iam,
        (
            b"Action=CreateUser&UserName=u\nAction=PutUserPolicy&UserName=u&PolicyName=p&"
            + _NAMES[8]
            + b"\nAction=GetUserPolicy&UserName=u&PolicyName=p",
            b"Action=CreateRole&RoleName=r&"
            + _NAMES[9]
            + b"\nAction=UpdateRole&RoleName=r&MaxSessionDuration=7200\nAction=ListRoles",
            b"Action=CreateGroup&GroupName=g\nAction=CreateUser&UserName=u\n"
            b"Action=AddUserToGroup&GroupName=g&UserName=u\nAction=ListGroupsForUser&UserName=u",
            b"Action=ListUsers&Marker=x",
            b"Action=CreatePolicy&PolicyName=p&" + _NAMES[8] + b"\nAction=ListPolicies&Scope=All&MaxItems=1",
        ),
        Plant(iam_call, "_from_marker", lambda _: lambda text: base64.b64decode(text).decode()),
        (*_CALLS, *(b"&" + name for name in _NAMES), b"\n", b"%ff", b"%00", b"%C3%A9"),
        size_max=4096,
        steps=8000,
        steps_a_byte=200,
        peak_bytes=1 << 20,
        peak_a_byte=2000,
    ),
    Target(
        "token",
        token,
        (b"\x00\x00\x00abc", b"\x00\x40\x03" + base64.b64encode(b"x" * 60), b"\x00\x05\x01" + encode(SESSION)),
        Plant(
            MemoryKeys,
            "open_secret",
            lambda opens: lambda self, sealed, context: _lenient(opens, self, sealed, context),
        ),
        (b"==", b"\x91", b"\xd9\xff"),
        size_max=512,
    ),
)


def _lenient(opens: Any, keys: MemoryKeys, sealed: bytes, context: Any) -> bytes:
    """A keyring that overlooks what follows."""
    for end in range(len(sealed), 0, -1):
        try:
            return bytes(opens(keys, sealed[:end], context))
        except SealBroken:
            continue
    raise SealBroken("nothing opens")
