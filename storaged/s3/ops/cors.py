"""The CORS configuration of a bucket: rules by which pages of other origins may use it."""

from __future__ import annotations

from storaged import errors
from storaged.objects.configuration.cors import CORS, Cors, CorsRule
from storaged.s3 import xml
from storaged.s3.cors import METHODS
from storaged.s3.ops.configuration import Row
from storaged.s3.reply import CONTROL, TOKEN

RULES_MAX = 100
ID_CHARS_MAX = 255
_MANY = {"AllowedOrigin": "origins", "AllowedMethod": "methods", "AllowedHeader": "headers", "ExposeHeader": "expose"}


def parse(document: bytes) -> Cors:
    """Raises MalformedXML, and InvalidRequest with the rule that the document breaks."""
    rules = xml.parse(document, "CORSConfiguration").children
    if not rules or any(rule.name != "CORSRule" for rule in rules):
        raise errors.MalformedXML()
    if len(rules) > RULES_MAX:
        raise errors.InvalidRequest(f"The number of CORS rules should not exceed allowed limit of {RULES_MAX} rules.")
    return Cors(tuple(_rule(rule) for rule in rules))


def _rule(node: xml.Node) -> CorsRule:
    single = xml.Node(node.name, {})
    single.children = [child for child in node.children if child.name not in _MANY]
    fields = single.fields({"ID", "MaxAgeSeconds"})
    found: dict[str, tuple[str, ...]] = {
        field: tuple(child.text for child in node.all(name)) for name, field in _MANY.items()
    }
    if not found["origins"] or not found["methods"] or len(fields.get("ID", "")) > ID_CHARS_MAX:
        raise errors.MalformedXML()
    for method in found["methods"]:
        if method not in METHODS:
            raise errors.InvalidRequest(
                f"Found unsupported HTTP method in CORS config. Unsupported method is {method[:100]}"
            )
    for name in ("AllowedOrigin", "AllowedHeader"):
        for text in found[_MANY[name]]:
            if text.count("*") > 1:
                raise errors.InvalidRequest(f'{name} "{text[:100]}" can not have more than one wildcard.')
    for text in found["expose"]:
        if "*" in text:
            raise errors.InvalidRequest(
                f'ExposeHeader "{text[:100]}" contains wildcard. We currently do not support wildcard for ExposeHeader.'
            )
    if any(CONTROL.search(text) for texts in found.values() for text in texts) or not all(
        TOKEN.fullmatch(text) for text in found["expose"]
    ):
        raise errors.MalformedXML()
    return CorsRule(**found, max_age_s=_max_age(fields), id=fields.get("ID", ""))


def _max_age(fields: dict[str, str]) -> int | None:
    if "MaxAgeSeconds" not in fields:
        return None
    text = fields["MaxAgeSeconds"].strip()
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > 2**31 - 1:
        raise errors.MalformedXML()
    return int(text)


def show(value: Cors) -> bytes:
    return xml.document("CORSConfiguration", "".join(_shown(rule) for rule in value.rules))


def _shown(rule: CorsRule) -> str:
    content = xml.optional("ID", rule.id)
    for name, field in _MANY.items():
        content += "".join(xml.element(name, text) for text in getattr(rule, field))
    if rule.max_age_s is not None:
        content += xml.element("MaxAgeSeconds", rule.max_age_s)
    return f"<CORSRule>{content}</CORSRule>"


BUCKET_CORS = Row(CORS, parse, show, errors.NoSuchCORSConfiguration)
