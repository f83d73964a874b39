"""The whole S3 front, on an object plane in memory: a request of any kind, signed or not, to its answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

from storaged.errors import S3Error
from storaged.node.quotas import quotas_of
from storaged.objects.api import BodyChecks, NewMeta, Principal
from storaged.objects.configuration.access import OWNERSHIP, WRITER, Ownership
from storaged.objects.configuration.document import NOTHING
from storaged.objects.configuration.kinds import ENABLED, LOCK, VERSIONING, ObjectLock, Versioning
from storaged.objects.plane import ObjectLimits
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.users import UserService
from storaged.s3.app import S3App
from storaged.s3.context import AccessLogSettings, Endpoint
from storaged.s3.http.connection import Connection
from storaged.s3.http.grammar import parse_head
from storaged.s3.http.limits import Limits
from storaged.s3.ops import listing
from storaged.s3.request import parse_target
from storaged.s3.routes import SUBRESOURCES
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target
from tests.fuzz.targets.documents import KINDS
from tests.fuzz.targets.headers import _HEADERS, second_canonical, second_signature
from tests.fuzz.targets.policies import _POLICY
from tests.sim.virtual import VirtualLoop
from tests.worlds import objects

WALL_MS = 1_760_000_000_000
STAMP, DAY = "20251009T085320Z", "20251009"
REGION = "eu-fr-1"
USERS = (("AKMAIN", "main/secret+key"), ("AKALT", "alt-secret"))
PATIENCE_S = 300.0
"""Of virtual time: no request waits for longer."""


class StillClock:
    """Its wall clock does not move, so that signatures are always fresh."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_ms(self) -> int:
        return WALL_MS


class Transport(asyncio.Transport):
    """Keeps what is written, and ends like a socket."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.7", 5)})
        self.written = bytearray()
        self.ended = asyncio.Event()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.ended.is_set()

    def close(self) -> None:
        self.ended.set()

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass


class Front:
    """A front, two users, two buckets (``plain``; ``locked`` with versions, lock, and lists), an object and an upload
    in each."""

    def __init__(self) -> None:
        self.world = objects.World(limits=ObjectLimits(bucket_cache_s=1, user_cache_s=1))
        self.world.clock = StillClock()
        plane = self.world.plane()
        self.objects, self.buckets, self.users = ObjectService(plane), BucketService(plane), UserService(plane)
        self.app = S3App(
            self.objects,
            self.buckets,
            self.users,
            Endpoint(
                REGION,
                domains=("s3.example.eu",),
                website_domain="web.example.eu",
                limits=Limits(),
                access_logs=AccessLogSettings(interval_s=1e9),
            ),
            clock=self.world.clock,
            entropy=lambda count: bytes(count),
            quotas=quotas_of(self.objects, self.buckets, self.users, self.world.clock),
        )
        self.connections = self.app.open()

    async def fill(self) -> None:
        for number, (access, secret) in enumerate(USERS):
            await self.users.add(f"user{number}", access_key=access, secret_key=secret)
        who: Principal = (await self.users.lookup(USERS[0][0]))[0]
        await self.buckets.create(who, "plain", region=REGION)
        special = NOTHING.having(VERSIONING, Versioning(ENABLED)).having(LOCK, ObjectLock())
        await self.buckets.create(
            who, "locked", region=REGION, configuration=special.having(OWNERSHIP, Ownership(WRITER))
        )
        for name in ("plain", "locked"):
            record = await self.buckets.get(name)
            body = objects.pieces(b"0123456789")
            await self.objects.put(
                record, b"k", body, NewMeta(tags={"a": "b"}), BodyChecks(size=10), owner=record.owner
            )
            await self.objects.create_upload(
                record, b"u", NewMeta(), owner=record.owner, initiator=record.owner, algorithm="", checksum_type=""
            )

    async def upload_id(self, bucket: str) -> str:
        uploads, _, _ = await self.objects.list_uploads(await self.buckets.get(bucket))
        return uploads[0].upload_id

    def state(self) -> Any:
        """All that a request can change."""
        ring = self.world.ring
        fragments = {disk: dict(store.fragments) for disk, store in self.world.disks.disks.items()}
        return dict(ring.values), dict(ring.pages), dict(ring.fences), fragments

    async def answer(self, pieces: list[bytes]) -> bytes:
        """All that the front writes to what a client sends, until it closes."""
        transport = Transport()
        connection: Connection = self.connections()
        connection.connection_made(transport)
        async with asyncio.timeout(PATIENCE_S):
            for piece in pieces:
                at = 0
                while at < len(piece) and not transport.is_closing():
                    room = connection.get_buffer(-1)
                    part = piece[at : at + len(room)]
                    room[: len(part)] = part
                    connection.buffer_updated(len(part))
                    at += len(part)
                    await asyncio.sleep(0)
            if not transport.is_closing() and not connection.eof_received():
                transport.close()
            await transport.ended.wait()
        connection.connection_lost(None)
        return bytes(transport.written)

    async def close(self) -> None:
        await self.app.close(0.1)
        await self.objects.close()


def sign(user: int, method: str, target: bytes, lines: list[bytes], body: bytes, service: str) -> list[bytes]:
    """More lines of a head, which sign it as a second implementation does."""
    access, secret = USERS[user]
    payload = hashlib.sha256(body).hexdigest()
    more = [b"x-amz-date: " + STAMP.encode(), b"x-amz-content-sha256: " + payload.encode()]
    head = parse_head(
        b"\r\n".join([method.encode() + b" " + target + b" HTTP/1.1", b"Host: h", *lines, *more]), Limits()
    )
    parse_target(head.target)
    path, _, query = head.target.partition(b"?")
    signed = sorted(name for name in head.headers if name not in ("authorization", "connection", "expect"))
    scope = f"{DAY}/{REGION}/{service}/aws4_request"
    canonical = second_canonical(method, path, query, signed, head.headers, head.headers["x-amz-content-sha256"])
    signature = second_signature(secret, scope, STAMP, canonical)
    text = f"AWS4-HMAC-SHA256 Credential={access}/{scope}, SignedHeaders={';'.join(signed)}, Signature={signature}"
    return [*more, b"Authorization: " + text.encode()]


METHODS = ("GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS")
HOSTS = (b"h", b"plain.s3.example.eu", b"plain.web.example.eu")


def front(data: bytes) -> None:
    """Every request has a whole answer of HTTP/1.1, whose status is never 500 or 503, and whose document is a
    well-formed one. A request that is refused has changed nothing. No change without a signature gets 2xx. After any
    request the front still serves a plain GET."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(_front(Choices(data)))
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        loop.close()
    assert not loop.troubles, loop.troubles


async def _front(choices: Choices) -> None:
    who, method, host, cut = choices.number(4), choices.pick(METHODS), choices.pick(HOSTS), choices.byte()
    target = b"/" + choices.line()
    lines_text, _, body = choices.rest().partition(b"\r\n\r\n")
    lines = [line for line in lines_text.split(b"\r\n") if line]
    world = Front()
    try:
        await world.fill()
        for bucket in ("plain", "locked"):
            target = target.replace(b"UPLOAD" + bucket.encode(), (await world.upload_id(bucket)).encode())
        service = "iam" if method == "POST" and target == b"/" else "s3"
        if service == "iam":
            lines = [line for line in lines if not line.lower().startswith(b"content-type")]
            lines.append(b"Content-Type: application/x-www-form-urlencoded")
        if b"?delete" in target and method == "POST":
            lines.append(b"Content-MD5: " + base64.b64encode(hashlib.md5(body).digest()))
        try:
            more = sign(who, method, target, lines, body, service) if who < 2 else []
        except (S3Error, UnicodeError):
            more = []
        head = [method.encode() + b" " + target + b" HTTP/1.1", b"Host: h" if more else b"Host: " + host, *lines, *more]
        if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in lines):
            head.append(b"Content-Length: %d" % len(body))
        sent = b"\r\n".join([*head, b"Connection: close"]) + b"\r\n\r\n" + body
        before = world.state()
        place = cut % (len(sent) + 1)
        said = await world.answer([sent[:place], sent[place:]])
        _check(world, said, before, method, signed=bool(more))
        lines = sign(0, "GET", b"/plain/k", [], b"", "s3")
        again = await world.answer(
            [b"\r\n".join([b"GET /plain/k HTTP/1.1", b"Host: h", *lines, b"Connection: close"]) + b"\r\n\r\n"]
        )
        assert re.match(rb"HTTP/1.1 (200|404|403)", again), "the front does not serve any more"
    finally:
        await world.close()


_STATUS = re.compile(rb"HTTP/1.1 (\d{3}) [ -~]+\r\n")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def _check(world: Front, said: bytes, before: Any, method: str, *, signed: bool) -> None:
    said = said.removeprefix(_CONTINUE)
    match = _STATUS.match(said)
    assert match is not None, "this is no answer"
    status = int(match[1])
    head, _, body = said.partition(b"\r\n\r\n")
    assert status < 500 or status == 501, "it failed"
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|[^\r]\n", head), "a header has control characters"
    lengths = re.findall(rb"\r\nContent-Length: (\d+)", head)
    if method != "HEAD" and status not in (204, 304):
        assert lengths == [str(len(body)).encode()] or b"\r\nTransfer-Encoding: chunked" in head, (
            "the answer is not whole"
        )
    if b"\r\nContent-Type: application/xml" in head and body and lengths:
        assert body.lstrip().startswith((b"<?xml", b"{"))
    if status >= 400 or status == 304:
        assert world.state() == before, "what is refused has changed something"
    elif method in ("PUT", "DELETE") and not signed:
        raise AssertionError("a change without a signature succeeds")


_IAM = (
    b"\x00\x02\x00\x00\n\r\n\r\nAction=CreateUser&Version=2010-05-08&UserName=u&Path=/a/"
    b"&Tags.member.1.Key=k&Tags.member.1.Value=v",
    b"\x00\x02\x00\x00\n\r\n\r\nAction=CreateRole&RoleName=r&AssumeRolePolicyDocument=%7B%7D",
    b"\x00\x02\x00\x00\n\r\n\r\nAction=ListUsers&MaxItems=1&Marker=dQ==",
)


def _seed(method: str, target: bytes, *headers: bytes, body: bytes = b"", who: int = 0, host: int = 0) -> bytes:
    return bytes((who, METHODS.index(method), host, 0)) + target + b"\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body


def _put_of(kind: Callable[..., Any], name: str) -> bytes:
    return next(each.example for each in KINDS if each.parse is kind) if kind else name.encode()


_DOCUMENTS = (
    b"tagging",
    b"acl",
    b"cors",
    b"lifecycle",
    b"website",
    b"encryption",
    b"publicAccessBlock",
    b"ownershipControls",
    b"object-lock",
    b"logging",
    b"notification",
    b"versioning",
)
_CREATION = b"<CreateBucketConfiguration><LocationConstraint>eu-fr-1</LocationConstraint></CreateBucketConfiguration>"
_DELETE = b"<Delete><Object><Key>k</Key><VersionId>x</VersionId><ETag>e</ETag></Object><Quiet>true</Quiet></Delete>"
_FORM = (
    b'--b\r\nContent-Disposition: form-data; name="key"\r\n\r\nf/${filename}\r\n'
    b'--b\r\nContent-Disposition: form-data; name="acl"\r\n\r\nprivate\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--b--\r\n'
)

SEEDS = (
    *(_seed("PUT", b"locked?" + name, body=KINDS[number].example) for number, name in enumerate(_DOCUMENTS)),
    *(
        _seed("GET", b"locked?" + name)
        for name in (
            b"versions",
            b"uploads",
            b"location",
            b"acl",
            b"policyStatus",
            b"list-type=2&continuation-token=x",
            b"list-type=2&prefix=a&delimiter=/&max-keys=1&start-after=b&encoding-type=url",
            b"versions&key-marker=a&version-id-marker=b",
        )
    ),
    *(
        _seed("GET", b"plain/k?" + name)
        for name in (
            b"acl",
            b"tagging",
            b"attributes",
            b"partNumber=1",
            b"response-content-type=a/b",
            b"retention",
            b"legal-hold",
            b"versionId=null",
        )
    ),
    _seed("GET", b"locked/u?uploadId=UPLOADlocked&max-parts=1&part-number-marker=5"),
    _seed("POST", b"locked/u?uploadId=UPLOADlocked", body=KINDS[14].example),
    _seed("PUT", b"locked/u?uploadId=UPLOADlocked&partNumber=1", body=b"abc"),
    _seed("DELETE", b"plain/u?uploadId=UPLOADplain"),
    _seed("PUT", b"locked?policy", body=str(_POLICY).replace("'", '"').replace("bucket", "locked").encode()),
    _seed("PUT", b"new", b"x-amz-acl: private", b"x-amz-bucket-object-lock-enabled: true", body=_CREATION),
    _seed("PUT", b"plain/new", *(header.strip() for header in _HEADERS[:5]), body=b"abc"),
    _seed("PUT", b"plain/copy", b"x-amz-copy-source: /locked/k?versionId=x", b"x-amz-metadata-directive: REPLACE"),
    _seed(
        "PUT",
        b"plain/u?uploadId=UPLOADplain&partNumber=2",
        b"x-amz-copy-source: plain/k",
        b"x-amz-copy-source-range: bytes=1-5",
    ),
    _seed("PUT", b"locked/k?retention", body=KINDS[12].example),
    _seed("PUT", b"locked/k?legal-hold", body=KINDS[13].example),
    _seed("PUT", b"locked/k?tagging", body=KINDS[0].example),
    _seed("PUT", b"locked/k?acl", body=KINDS[1].example),
    _seed("PUT", b"locked/k?encryption", body=KINDS[15].example),
    _seed("POST", b"locked?delete", body=_DELETE),
    _seed("DELETE", b"locked/k?versionId=0", b"x-amz-bypass-governance-retention: true", b'If-Match: "a"'),
    _seed("GET", b"plain/k", b"Range: bytes=2-5", b'If-None-Match: "a"', b"Origin: http://a"),
    _seed(
        "OPTIONS",
        b"plain/k",
        b"Origin: http://a",
        b"Access-Control-Request-Method: PUT",
        b"Access-Control-Request-Headers: a, b",
    ),
    _seed("POST", b"plain", b"Content-Type: multipart/form-data; boundary=b", body=_FORM, who=2),
    _seed("GET", b"a/b/", who=3, host=2),
    _seed(
        "PUT",
        b"k",
        b"x-amz-content-sha256: STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        b"x-amz-trailer: x-amz-checksum-crc32",
        b"Transfer-Encoding: chunked",
        body=b"5\r\nhello\r\n0\r\n\r\n",
        who=3,
        host=1,
    ),
    *_IAM,
)

TARGETS = (
    Target(
        "front",
        front,
        SEEDS,
        Plant(listing, "_from_token", lambda _: lambda token: base64.b64decode(token)),
        (
            *_HEADERS,
            *(b"?" + name.encode() for name in sorted(SUBRESOURCES)),
            b"&continuation-token=%ff",
            b"continuation-token=x",
            b"locked/k",
            b"plain/k",
            b"versionId=",
            b"uploadId=UPLOADlocked",
            b"Action=",
            b"Version=2010-05-08",
            b"UserName=u",
            b"PolicyDocument=",
        ),
        size_max=8192,
        steps=60_000,
        steps_a_byte=200,
        peak_bytes=4 << 20,
        peak_a_byte=2000,
    ),
)
