"""The website configuration of a bucket.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutBucketWebsite.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from storaged import errors
from storaged.objects.configuration.website import WEBSITE, RoutingRule, Website
from storaged.s3 import xml
from storaged.s3.ops.configuration import Row
from storaged.s3.reply import CONTROL

RULES_MAX = 50
KEY_BYTES_MAX = 1024
_HOST = re.compile(r"[A-Za-z0-9._~:\[\]-]{1,255}")
_PARTS = frozenset({"IndexDocument", "ErrorDocument", "RedirectAllRequestsTo", "RoutingRules"})
_REDIRECT = frozenset({"HostName", "HttpRedirectCode", "Protocol", "ReplaceKeyPrefixWith", "ReplaceKeyWith"})
_CONDITION = frozenset({"KeyPrefixEquals", "HttpErrorCodeReturnedEquals"})


def parse(document: bytes) -> Website:
    """Raises MalformedXML; InvalidArgument, InvalidRequest with what is wrong."""
    root = xml.parse(document, "WebsiteConfiguration")
    parts = {child.name: child for child in root.children}
    if parts.keys() - _PARTS or len(parts) != len(root.children):
        raise errors.MalformedXML()
    if "RedirectAllRequestsTo" in parts:
        if len(parts) > 1:
            raise errors.InvalidRequest(
                "RedirectAllRequestsTo cannot be provided in conjunction with other Routing Rules."
            )
        fields = parts["RedirectAllRequestsTo"].fields({"HostName", "Protocol"})
        if not fields.get("HostName"):
            raise errors.MalformedXML()
        return Website(redirect_host=_host(fields), redirect_protocol=_protocol(fields))
    return Website(_index(parts), _error(parts), rules=_rules(parts))


def _index(parts: Mapping[str, xml.Node]) -> str:
    suffix = parts["IndexDocument"].fields({"Suffix"}).get("Suffix", "") if "IndexDocument" in parts else None
    if suffix is None:
        raise errors.InvalidArgument(
            "A value for IndexDocument Suffix must be provided if RedirectAllRequestsTo is empty",
            ArgumentName="IndexDocument",
            ArgumentValue="null",
        )
    if not suffix or "/" in suffix or not _is_key(suffix):
        raise errors.InvalidArgument(
            "The IndexDocument Suffix is not well formed", ArgumentName="IndexDocument", ArgumentValue=suffix[:200]
        )
    return suffix


def _error(parts: Mapping[str, xml.Node]) -> str:
    if "ErrorDocument" not in parts:
        return ""
    key = parts["ErrorDocument"].fields({"Key"}).get("Key", "")
    if not key or not _is_key(key):
        raise errors.InvalidArgument(
            "The ErrorDocument Key is not well formed", ArgumentName="ErrorDocument", ArgumentValue=key[:200]
        )
    return key


def _is_key(text: str) -> bool:
    return len(text.encode()) <= KEY_BYTES_MAX and not CONTROL.search(text)


def _rules(parts: Mapping[str, xml.Node]) -> tuple[RoutingRule, ...]:
    if "RoutingRules" not in parts:
        return ()
    nodes = parts["RoutingRules"].children
    if not nodes or any(node.name != "RoutingRule" for node in nodes):
        raise errors.MalformedXML()
    if len(nodes) > RULES_MAX:
        raise errors.InvalidRequest(
            f"{len(nodes)} routing rules provided, the number of routing rules in a website configuration is limited to"
            f" {RULES_MAX}."
        )
    return tuple(map(_rule, nodes))


def _rule(node: xml.Node) -> RoutingRule:
    parts = {child.name: child for child in node.children}
    if parts.keys() - {"Condition", "Redirect"} or len(parts) != len(node.children) or "Redirect" not in parts:
        raise errors.MalformedXML()
    fields = parts["Redirect"].fields(_REDIRECT)
    condition = parts["Condition"].fields(_CONDITION) if "Condition" in parts else {}
    if not fields or ("Condition" in parts and not condition):
        raise errors.MalformedXML()
    if "ReplaceKeyWith" in fields and "ReplaceKeyPrefixWith" in fields:
        raise errors.InvalidRequest("You can only define ReplaceKeyPrefix or ReplaceKey but not both.")
    if not all(map(_is_key, (*fields.values(), *condition.values()))):
        raise errors.MalformedXML()
    return RoutingRule(
        condition.get("KeyPrefixEquals", ""),
        _status("error", condition["HttpErrorCodeReturnedEquals"]) if "HttpErrorCodeReturnedEquals" in condition else 0,
        _host(fields),
        _protocol(fields),
        fields.get("ReplaceKeyPrefixWith"),
        fields.get("ReplaceKeyWith"),
        _status("redirect", fields["HttpRedirectCode"]) if "HttpRedirectCode" in fields else 301,
        "KeyPrefixEquals" in condition,
        "HttpRedirectCode" in fields,
    )


def _status(kind: str, text: str) -> int:
    """Raises InvalidRequest."""
    value = int(text) if re.fullmatch("[0-9]{3}", text, re.ASCII) else 0
    if kind == "error" and not 400 <= value <= 599:
        raise errors.InvalidRequest(
            f"The provided HTTP error code ({text[:100]}) is not valid. Valid codes are 4XX or 5XX."
        )
    if kind == "redirect" and not 301 <= value <= 399:
        raise errors.InvalidRequest(
            f"The provided HTTP redirect code ({text[:100]}) is not valid. Valid codes are 3XX except 300."
        )
    return value


def _host(fields: Mapping[str, str]) -> str:
    host = fields.get("HostName", "")
    if "HostName" in fields and not _HOST.fullmatch(host):
        raise errors.InvalidArgument(
            "The HostName of a redirection is not a host.", ArgumentName="HostName", ArgumentValue=host[:200]
        )
    return host


def _protocol(fields: Mapping[str, str]) -> str:
    protocol = fields.get("Protocol", "")
    if "Protocol" in fields and protocol not in ("http", "https"):
        raise errors.InvalidRequest(
            "Invalid protocol, protocol can be http or https. If not defined the protocol will be selected"
            " automatically."
        )
    return protocol


# --- printing ---------------------------------------------------------------------------------------------------------


def show(value: Website) -> bytes:
    if value.redirect_host:
        content = xml.element("HostName", value.redirect_host) + xml.optional("Protocol", value.redirect_protocol)
        return xml.document("WebsiteConfiguration", f"<RedirectAllRequestsTo>{content}</RedirectAllRequestsTo>")
    parts = [f"<IndexDocument>{xml.element('Suffix', value.index)}</IndexDocument>"]
    if value.error:
        parts.append(f"<ErrorDocument>{xml.element('Key', value.error)}</ErrorDocument>")
    if value.rules:
        parts.append(f"<RoutingRules>{''.join(map(_shown, value.rules))}</RoutingRules>")
    return xml.document("WebsiteConfiguration", *parts)


def _shown(rule: RoutingRule) -> str:
    condition = xml.element("KeyPrefixEquals", rule.prefix) if rule.shown_prefix else ""
    if rule.error:
        condition += xml.element("HttpErrorCodeReturnedEquals", rule.error)
    redirect = xml.optional("Protocol", rule.protocol) + xml.optional("HostName", rule.host)
    if rule.replace_prefix is not None:
        redirect += xml.element("ReplaceKeyPrefixWith", rule.replace_prefix)
    if rule.replace_key is not None:
        redirect += xml.element("ReplaceKeyWith", rule.replace_key)
    if rule.shown_status:
        redirect += xml.element("HttpRedirectCode", rule.status)
    if condition:
        condition = f"<Condition>{condition}</Condition>"
    return f"<RoutingRule>{condition}<Redirect>{redirect}</Redirect></RoutingRule>"


BUCKET_WEBSITE = Row(WEBSITE, parse, show, errors.NoSuchWebsiteConfiguration)
