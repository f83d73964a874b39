"""The values of condition keys for a request. Pure: what the request and its sender say, and the object if it was
looked at.

https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html#amazons3-policy-keys
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final
from urllib.parse import parse_qsl, unquote_to_bytes

from storaged.errors import AccessDenied
from storaged.objects.api import ObjectAccess, Principal
from storaged.objects.identity import account_of
from storaged.s3.auth.authorize import ObjectWanted, Unknown
from storaged.s3.auth.principals import caller_id, principal_arn
from storaged.s3.conditions import parse_http_time
from storaged.s3.request import Request

EXISTING_TAG: Final = "s3:existingobjecttag/"
REQUEST_TAG: Final = "s3:requestobjecttag/"
TAG_KEYS: Final = "s3:requestobjecttagkeys"
PRINCIPAL_TAG: Final = "aws:principaltag/"
NOTHING: Final[Mapping[str, str]] = {}
CHARS_MAX: Final = 4096
"""Of a value. A User-Agent of 16 KB would keep a policy busy for 200 ms and more, and all other requests waiting."""

_Fact = Callable[["Facts"], "str | None"]


def request_tags(tags: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The keys for the tags that a call of IAM gives."""
    return {f"aws:requesttag/{key}": value for key, value in tags}


def resource_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The keys for the tags of a user or a role that a call is about. IAM's own key is asked for in lower case."""
    return {f"aws:resourcetag/{key}": value for key, value in tags.items()} | {
        f"iam:resourcetag/{key.lower()}": value for key, value in tags.items()
    }


class Facts:
    """A ``conditions.Facts``. ``headers``: of the request, the fields of a form, or those that concern the old key of a
    rename. ``owner``: of the bucket. ``prefix``: in place of the parameter, when another permission is asked for than
    the request's. ``own``: keys of IAM and STS, which only their requests have.
    """

    def __init__(
        self,
        request: Request,
        owner: str,
        now_ms: int,
        *,
        headers: Mapping[str, str],
        found: ObjectAccess | Unknown | None,
        version: str = "",
        prefix: str | None = None,
        own: Mapping[str, str] = NOTHING,
    ) -> None:
        self.request = request
        self.owner = owner
        self.now_ms = now_ms
        self.headers = headers
        self.found = found
        self.version = version
        self.prefix = prefix
        self.own = own

    def __call__(self, name: str) -> Sequence[str] | None:
        """Raises ObjectWanted, and AccessDenied for what can't be known at this time: it counts as denied."""
        if name.startswith(EXISTING_TAG):
            return self._existing_tag(name[len(EXISTING_TAG) :])
        if name.startswith(REQUEST_TAG) or name == TAG_KEYS:
            tags = self._request_tags()
            if name == TAG_KEYS:
                return tuple(tags) or None
            value = tags.get(name[len(REQUEST_TAG) :])
            return None if value is None else (value,)
        if name.startswith(PRINCIPAL_TAG):
            identity = self.request.who.identity
            value = identity.tags.get(name[len(PRINCIPAL_TAG) :]) if identity is not None else None
            return None if value is None else (value,)
        if name in self.own:
            return (self.own[name],)
        fact = _FACTS.get(name)
        value = fact(self) if fact is not None else self._header(name)
        if value is not None and len(value) > CHARS_MAX:
            raise AccessDenied(f"A policy asks for {name}, which has more than {CHARS_MAX} characters.")
        return None if value is None else (value,)

    def _existing_tag(self, name: str) -> Sequence[str] | None:
        if isinstance(self.found, Unknown):
            raise ObjectWanted
        value = self.found.tags.get(name) if self.found is not None else None
        return None if value is None else (value,)

    def _request_tags(self) -> dict[str, str]:
        if self.request.operation == "PutObjectTagging" or "tagging" in self.headers:
            raise AccessDenied("A policy asks for the tags in the document of this request, which is not read yet.")
        if self.request.operation == "CopyObject" and self.headers.get("x-amz-tagging-directive") != "REPLACE":
            return {}  # the copy gets the tags of its source, whatever the header says
        return dict(parse_qsl(self.headers.get("x-amz-tagging", ""), keep_blank_values=True))

    def _header(self, name: str) -> str | None:
        """``s3:x-amz-acl``, ``s3:if-match``: the header of that name."""
        family, _, header = name.partition(":")
        return self.headers.get(header) if family == "s3" else None


def _moment(facts: Facts) -> str:
    return datetime.fromtimestamp(facts.now_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _signed(facts: Facts, value: str) -> str | None:
    return value if facts.request.who.access_key else None


def _is_form(facts: Facts) -> bool:
    return facts.request.operation == "PostObject"


def _auth_type(facts: Facts) -> str | None:
    if _is_form(facts):
        return _signed(facts, "POST")
    return _signed(facts, "REST-HEADER" if "authorization" in facts.request.headers else "REST-QUERY-STRING")


def _signature_age(facts: Facts) -> str | None:
    """Milliseconds since the signature was made."""
    text = facts.headers.get("x-amz-date") or facts.request.query.get("X-Amz-Date", "")
    try:
        made_ms: int | None = int(datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError:
        made_ms = parse_http_time(facts.headers.get("date", ""))
    return None if made_ms is None else _signed(facts, str(max(0, facts.now_ms - made_ms)))


def _signature_version(facts: Facts) -> str | None:
    """A form may have the older signature."""
    old = _is_form(facts) and "x-amz-algorithm" not in facts.headers
    return _signed(facts, "AWS" if old else "AWS4-HMAC-SHA256")


def _copy_source(facts: Facts) -> str | None:
    """``bucket/key``, however the client has written it: a statement that denies a source denies it in each form."""
    text = facts.headers.get("x-amz-copy-source")
    if text is None:
        return None
    path, mark, version = text.encode("utf-8", "surrogateescape").partition(b"?versionId=")
    source = unquote_to_bytes(path).removeprefix(b"/") + mark + version
    return source.decode("utf-8", "surrogateescape")


def _prefix(facts: Facts) -> str | None:
    return facts.prefix if facts.prefix is not None else facts.request.query.get("prefix")


def _parameter(name: str) -> _Fact:
    return lambda facts: facts.request.query.get(name)


def _lock(name: str) -> _Fact:
    return _header_unless_document(f"x-amz-object-lock-{name}", ("PutObjectRetention", "PutObjectLegalHold"))


def _header_unless_document(header: str, operations: tuple[str, ...]) -> _Fact:
    """``operations``: they take it from their document, so a header says nothing about what they do."""

    def fact(facts: Facts) -> str | None:
        if facts.request.operation in operations:
            raise AccessDenied("A policy asks for what the document of this request says, which is not read yet.")
        return facts.headers.get(header)

    return fact


def _inventory_fields(facts: Facts) -> str | None:
    if facts.request.operation == "PutBucketInventoryConfiguration":
        raise AccessDenied("A policy asks for the fields in the document of this request, which is not read yet.")
    return None


def _encryption(name: str) -> _Fact:
    return _header_unless_document(f"x-amz-server-side-encryption{name}", ("UpdateObjectEncryption",))


def _who(make: Callable[[Principal], str | None]) -> _Fact:
    def fact(facts: Facts) -> str | None:
        who = facts.request.who
        return make(who) if who.access_key else None

    return fact


def _type(who: Principal) -> str:
    """The root of an account counts as a user, as it did before accounts had users of their own."""
    return "AssumedRole" if who.identity is not None and who.identity.role else "User"


def _user_id(who: Principal) -> str:
    return who.user_id if who.identity is None or who.identity.root else caller_id(who)


def _username(who: Principal) -> str | None:
    if who.identity is None or who.identity.root:
        return who.display_name
    return who.identity.name or None


def _issued(who: Principal) -> str | None:
    if who.identity is None or not who.identity.temporary:
        return None
    return datetime.fromtimestamp(who.identity.issued_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _multi_factor(who: Principal) -> str | None:
    """There is none here. As on AWS, only temporary credentials say so."""
    return "false" if who.identity is not None and who.identity.temporary else None


_FACTS: Final[dict[str, _Fact]] = {
    "aws:currenttime": _moment,
    "aws:epochtime": lambda facts: str(facts.now_ms // 1000),
    "aws:securetransport": lambda facts: "true" if facts.request.secure else "false",
    "aws:sourceip": lambda facts: facts.request.remote or None,
    "aws:useragent": lambda facts: facts.request.headers.get("user-agent"),
    "aws:referer": lambda facts: facts.request.headers.get("referer"),
    "aws:principaltype": lambda facts: _type(facts.request.who) if facts.request.who.access_key else "Anonymous",
    "aws:principalisawsservice": lambda facts: "false",
    "aws:viaawsservice": lambda facts: "false",
    "aws:principalarn": _who(principal_arn),
    "aws:principalaccount": _who(lambda who: account_of(who.user_id)),
    "aws:userid": lambda facts: _user_id(facts.request.who) if facts.request.who.access_key else "anonymous",
    "aws:username": _who(_username),
    "aws:tokenissuetime": _who(_issued),
    "aws:multifactorauthpresent": _who(_multi_factor),
    "aws:resourceaccount": lambda facts: account_of(facts.owner),
    "s3:resourceaccount": lambda facts: account_of(facts.owner),
    "s3:authtype": _auth_type,
    "s3:signatureversion": _signature_version,
    "s3:x-amz-copy-source": _copy_source,
    "s3:signatureage": _signature_age,
    "s3:prefix": _prefix,
    "s3:delimiter": _parameter("delimiter"),
    "s3:max-keys": _parameter("max-keys"),
    "s3:versionid": lambda facts: facts.version or None,
    "s3:locationconstraint": lambda facts: None,
    "s3:object-lock-mode": _lock("mode"),
    "s3:object-lock-retain-until-date": _lock("retain-until-date"),
    "s3:object-lock-legal-hold": _lock("legal-hold"),
    "s3:x-amz-server-side-encryption": _encryption(""),
    "s3:x-amz-server-side-encryption-aws-kms-key-id": _encryption("-aws-kms-key-id"),
    "s3:inventoryaccessibleoptionalfields": _inventory_fields,
    "s3:dataaccesspointarn": lambda facts: None,
    "s3:dataaccesspointaccount": lambda facts: None,
    "s3:accesspointnetworkorigin": lambda facts: None,
}
"""Keys that no request can have here (VPCs, organisations, sessions) have no row: ``_header`` finds nothing."""
