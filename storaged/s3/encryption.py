"""Encryption as S3 requests ask for it, and as answers name it.

Every object is sealed under its own key, whatever a request asks for (``objects.encryption``). SSE-S3 needs no more.
SSE-KMS names the cluster's keyring as an AWS KMS key, by the key's id, its ARN or the alias ``alias/aws/s3``; another
key does not exist. SSE-C brings a key, which must come over TLS, or from this machine.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/ServerSideEncryptionCustomerKeys.html,
https://docs.aws.amazon.com/AmazonS3/latest/userguide/specifying-kms-encryption.html
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Mapping
from types import MappingProxyType

from storaged import errors
from storaged.errors import AccessDenied, InvalidArgument, InvalidEncryptionAlgorithmError, InvalidRequest, KMSNotFound
from storaged.objects.configuration.kinds import ENCRYPTION, SSE_C, DefaultEncryption
from storaged.objects.encryption import CUSTOMER, CUSTOMER_KEY_BYTES, KMS, NO_KEY, Encryption
from storaged.objects.encryption import S3 as S3
from storaged.s3.context import Front
from storaged.s3.reply import Headers
from storaged.s3.request import Request

SSE = "x-amz-server-side-encryption"
KMS_KEY = "x-amz-server-side-encryption-aws-kms-key-id"
BUCKET_KEY = "x-amz-server-side-encryption-bucket-key-enabled"
CONTEXT = "x-amz-server-side-encryption-context"
CUSTOMER_KEY = "x-amz-server-side-encryption-customer-"
CUSTOMER_KEY_SOURCE = "x-amz-copy-source-server-side-encryption-customer-"
DSSE = "aws:kms:dsse"

OF_UPLOAD = frozenset({SSE, KMS_KEY, BUCKET_KEY, CONTEXT})
"""What an upload is created with once and for all."""

ACCOUNT = "000000000000"
"""In the ARN of the keyring: it belongs to the cluster, not to a user."""
ALIAS = "alias/aws/s3"
CONTEXT_CHARS_MAX = 2048

_NEEDED = "Requests specifying Server Side Encryption with Customer provided keys must "


# --- values of headers ------------------------------------------------------------------------------------------------


def has_customer_key(headers: Mapping[str, str], prefix: str = CUSTOMER_KEY) -> bool:
    return any(name.startswith(prefix) for name in headers)


def parse_customer_key(headers: Mapping[str, str], prefix: str) -> bytes:
    """The key of the three headers that begin with ``prefix``; NO_KEY when there is none of them. Raises
    InvalidArgument."""
    if not has_customer_key(headers, prefix):
        return NO_KEY
    if not headers.get(prefix + "algorithm"):
        raise InvalidArgument(
            f"{_NEEDED}provide a valid encryption algorithm.", ArgumentName=prefix + "algorithm", ArgumentValue="null"
        )
    if headers[prefix + "algorithm"] != S3:
        raise InvalidEncryptionAlgorithmError(
            ArgumentName=prefix + "algorithm",
            ArgumentValue=headers[prefix + "algorithm"][:100],
        )
    key, digest = _decoded(headers, prefix + "key"), _decoded(headers, prefix + "key-md5")
    if len(key) != CUSTOMER_KEY_BYTES:
        raise InvalidArgument(
            f"{_NEEDED}provide an appropriate secret key.", ArgumentName=prefix + "key"
        )  # the value is a secret
    if not digest:
        raise InvalidArgument(
            f"{_NEEDED}provide the client calculated MD5 of the secret key.", ArgumentName=prefix + "key-md5"
        )
    if not hmac.compare_digest(hashlib.md5(key, usedforsecurity=False).digest(), digest):
        raise InvalidArgument(
            "The calculated MD5 hash of the key did not match the hash that was provided.",
            ArgumentName=prefix + "key-md5",
        )
    return key


def _decoded(headers: Mapping[str, str], name: str) -> bytes:
    """Empty for what is missing or no base64."""
    try:
        return base64.b64decode(headers.get(name, ""), validate=True)
    except (binascii.Error, ValueError):
        return b""


def check(headers: Mapping[str, str]) -> None:
    """Checks what the headers of a change say about the encryption of an object, each by itself and together. Raises
    InvalidArgument, NotImplemented."""
    kind = headers.get(SSE)
    customer = has_customer_key(headers)
    if customer and (kind is not None or any(name in headers for name in (KMS_KEY, CONTEXT, BUCKET_KEY))):
        raise InvalidArgument(
            "Server Side Encryption with Customer provided key is incompatible with the encryption method specified",
            ArgumentName=SSE,
            ArgumentValue=kind or "null",
        )
    if kind == DSSE:
        raise errors.NotImplemented("DSSE-KMS is not implemented: objects are encrypted in one layer.", Header=SSE)
    if kind not in (None, S3, KMS):
        raise InvalidArgument(
            "The encryption method specified is not supported", ArgumentName=SSE, ArgumentValue=(kind or "")[:100]
        )
    if kind != KMS:
        for name in (KMS_KEY, CONTEXT):
            if name in headers:
                raise InvalidArgument(
                    f"Server Side Encryption with AWS KMS managed key requires HTTP header {SSE} : aws:kms",
                    ArgumentName=SSE,
                    ArgumentValue=kind or "null",
                )
    parse_bucket_key(headers)
    if CONTEXT in headers:
        _check_context(headers[CONTEXT])
    parse_customer_key(headers, CUSTOMER_KEY)
    parse_customer_key(headers, CUSTOMER_KEY_SOURCE)


def parse_bucket_key(headers: Mapping[str, str]) -> bool:
    """Raises InvalidArgument."""
    value = headers.get(BUCKET_KEY, "false").lower()
    if value not in ("true", "false"):
        raise InvalidArgument(f"Invalid value for {BUCKET_KEY}.", ArgumentName=BUCKET_KEY, ArgumentValue=value[:100])
    return value == "true"


def _check_context(text: str) -> None:
    """Base64 of a JSON object of texts. Raises InvalidArgument."""
    try:
        found = json.loads(base64.b64decode(text, validate=True)) if len(text) <= CONTEXT_CHARS_MAX else None
    except (binascii.Error, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InvalidArgument(
            "The header 'x-amz-server-side-encryption-context' shall be Base64-encoded UTF-8 string holding JSON which"
            " represents a string-string map",
            ArgumentName=CONTEXT,
        )


# --- what a request asks for ------------------------------------------------------------------------------------------


def customer_key(front: Front, request: Request, prefix: str = CUSTOMER_KEY) -> bytes:
    """The key of SSE-C that a request has for an object, or with CUSTOMER_KEY_SOURCE for the source of a copy; NO_KEY
    without one. Raises InvalidArgument, InvalidRequest."""
    key = parse_customer_key(request.headers, prefix)
    if key != NO_KEY:
        _require_secure(front, request)
    return key


def _require_secure(front: Front, request: Request) -> None:
    """The key has come over TLS to this server or to a proxy of its site, or it never left this machine. Raises
    InvalidRequest: the client should consider the key known."""
    if request.secure:
        return
    try:
        address = ipaddress.ip_address(request.remote)
    except ValueError:
        address = None
    if address is not None:
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback:
            return
        proxied = any(address in ipaddress.ip_network(proxy) for proxy in front.endpoint.proxies)
        if proxied and request.headers.get("x-forwarded-proto") == "https":
            return
    raise InvalidRequest(f"{_NEEDED}be made over a secure connection.")


def asked(front: Front, request: Request, headers: Mapping[str, str]) -> Encryption | None:
    """The encryption of a new object: what the request says, or else its bucket's default; None: SSE-S3. ``headers``:
    of the request, or the fields of a form; checked by ``check``.

    Raises AccessDenied (the bucket blocks SSE-C), InvalidArgument, InvalidRequest, KMSNotFound, and as
    ``Buckets.configuration_of``."""
    kind = headers.get(SSE)
    if kind == S3:
        return None
    if kind == KMS:
        return _kms(front, headers, _default_of(front, request))
    key = parse_customer_key(headers, CUSTOMER_KEY)
    if key == NO_KEY:
        return default_encryption(front, request, headers)
    _require_secure(front, request)
    default = _default_of(front, request)
    if default is not None and SSE_C in default.blocked:
        raise AccessDenied("The bucket's encryption configuration blocks SSE-C.")
    return Encryption(CUSTOMER, customer_key=key)


def default_encryption(
    front: Front, request: Request, headers: Mapping[str, str] = MappingProxyType({})
) -> Encryption | None:
    """The encryption of a new object for which the request names none; None: SSE-S3. ``headers`` may ask for a Bucket
    Key. Raises KMSNotFound, and as ``Buckets.configuration_of``."""
    if request.bucket_record.plain:
        return None
    default = _default_of(front, request)
    return None if default is None or default.algorithm != KMS else _kms(front, headers, default)


def _default_of(front: Front, request: Request) -> DefaultEncryption | None:
    return front.buckets.configuration_of(request.bucket_record).get(ENCRYPTION)


def _kms(front: Front, headers: Mapping[str, str], default: DefaultEncryption | None) -> Encryption:
    """SSE-KMS as the request asks for it; what it leaves open is as the bucket has it."""
    if default is None or default.algorithm != KMS:
        default = DefaultEncryption(KMS)
    key_id = kms_arn(front, headers.get(KMS_KEY, default.key_id))
    bucket_key = parse_bucket_key(headers) if BUCKET_KEY in headers else default.bucket_key
    return Encryption(KMS, key_id, bucket_key, headers.get(CONTEXT, ""))


def kms_arn(front: Front, key_id: str) -> str:
    """The ARN of the cluster's key, which ``key_id`` names in any of AWS's forms; empty: the default. Raises
    KMSNotFound."""
    prefix, key = f"arn:aws:kms:{front.endpoint.region}:{ACCOUNT}:", front.objects.kms_key()
    if key_id.removeprefix(prefix) not in ("", key, f"key/{key}", ALIAS) or key_id == prefix:
        raise KMSNotFound(f"Key '{key_id[:200]}' does not exist. The key of this cluster is {prefix}key/{key}.")
    return f"{prefix}key/{key}"


async def check_of_upload(front: Front, request: Request) -> None:
    """Checks that a part or a Complete names no other encryption than its upload was created with. AWS refuses to have
    it named at all. Raises InvalidArgument, KMSNotFound."""
    kind = request.headers.get(SSE)
    if kind is None:
        return
    upload = await front.objects.find_upload(request.grant, request.key, request.query["uploadId"])
    if upload is not None and kind != (S3 if upload.encryption is None else upload.encryption.kind):
        raise InvalidArgument(f"The upload was created with another {SSE}.", ArgumentName=SSE, ArgumentValue=kind)
    kms_arn(front, request.headers.get(KMS_KEY, ""))


# --- answers ----------------------------------------------------------------------------------------------------------


def encryption_headers(encryption: Encryption, headers: Mapping[str, str], answer: Headers) -> None:
    """Makes an answer, which names SSE-S3, name another encryption. ``headers``: of the request, or the fields of a
    form. With SSE-C they have named the key, or the answer does not name it."""
    if encryption.kind != CUSTOMER:
        answer[SSE] = encryption.kind
        answer[KMS_KEY] = encryption.key_id
        if encryption.bucket_key:
            answer[BUCKET_KEY] = "true"
        return
    answer.pop(SSE, None)
    if digest := headers.get(CUSTOMER_KEY + "key-md5"):
        answer[CUSTOMER_KEY + "algorithm"] = S3
        answer[CUSTOMER_KEY + "key-MD5"] = digest


def written_headers(encryption: Encryption | None, headers: Mapping[str, str], answer: Headers) -> Headers:
    """``answer`` to a write, after ``encryption_headers``; it names the encryption context too."""
    if encryption is not None:
        encryption_headers(encryption, headers, answer)
        if encryption.context:
            answer[CONTEXT] = encryption.context
    return answer
