"""Buckets of all users, for the operator: list, create, count, hand over, delete.

GET    /v1/buckets                      all buckets of the cluster, without counts
POST   /v1/buckets                      {name, user, countries}
GET    /v1/buckets/NAME/usage?after=    counts a piece, from a mark on; ask again with ``next_after``
GET    /v1/buckets/NAME/lifecycle       its rules, and how far they are carried out
GET    /v1/buckets/NAME/inventories     its inventories, and how far they are
POST   /v1/buckets/NAME/owner           {user}
GET    /v1/buckets/NAME/quota           what it may have: bytes, objects; 0: no limit
POST   /v1/buckets/NAME/quota           {bytes, objects}
GET    /v1/buckets/NAME/copies          up to which size its objects are whole copies: bytes; null: the gateways' own
POST   /v1/buckets/NAME/copies          {bytes}; empty: the gateways' own
GET    /v1/users/NAME/quota             what the buckets of an account may have together
POST   /v1/users/NAME/quota             {bytes, objects}
GET    /v1/buckets/NAME/lost?key=       how many versions of a key (hex) are lost with their pages
POST   /v1/buckets/NAME/lost            {key, count}: removes them, see ``objects.write.lost``
POST   /v1/buckets/NAME/unlock          {order}: ends the lock of a version, see ``cluster.unlock``
DELETE /v1/buckets/NAME                 an empty bucket
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web

from storaged.admin.body import NotHere, recorded, texts_of
from storaged.admin.iam import account_named
from storaged.admin.ports import Services
from storaged.config.sections import SMALL_OBJECT_BYTES_MAX
from storaged.errors import BucketAlreadyOwnedByYou, InvalidArgument, InvalidBucketName
from storaged.objects.api import Buckets, Principal, Users
from storaged.objects.configuration.kinds import COPIES, QUOTA, Quota
from storaged.objects.names import bucket_name_valid
from storaged.objects.records import BucketRecord

REASON_CHARS_MAX = 2000
COUNT_CHARS_MAX = 19


class BucketAdministration:
    """Handlers over a gateway's services. A storage node answers NOT_HERE."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/buckets", self._list),
            web.post("/v1/buckets", self._create),
            web.get("/v1/buckets/{name}/usage", self._usage),
            web.get("/v1/buckets/{name}/lifecycle", self._lifecycle),
            web.get("/v1/buckets/{name}/inventories", self._inventories),
            web.post("/v1/buckets/{name}/owner", self._set_owner),
            web.get("/v1/buckets/{name}/quota", self._bucket_quota),
            web.post("/v1/buckets/{name}/quota", self._set_bucket_quota),
            web.get("/v1/buckets/{name}/copies", self._bucket_copies),
            web.post("/v1/buckets/{name}/copies", self._set_bucket_copies),
            web.get("/v1/users/{name}/quota", self._account_quota),
            web.post("/v1/users/{name}/quota", self._set_account_quota),
            web.post("/v1/buckets/{name}/unlock", self._unlock),
            web.get("/v1/buckets/{name}/lost", self._lost),
            web.post("/v1/buckets/{name}/lost", self._forget_lost),
            web.delete("/v1/buckets/{name}", self._delete),
        ]

    def _planes(self) -> tuple[Buckets, Users]:
        if self._services.buckets is None or self._services.users is None:
            raise NotHere
        return self._services.buckets, self._services.users

    async def _list(self, _request: web.Request) -> web.Response:
        _, users = self._planes()
        if self._services.every_bucket is None:
            raise NotHere
        names = names_by_id(await users.list_users())
        found = [bucket_document(record, names) for record in await self._services.every_bucket()]
        return web.json_response({"buckets": sorted(found, key=lambda one: one["bucket"])})

    async def _create(self, request: web.Request) -> web.Response:
        """Makes a bucket for a user named by name or access key. It succeeds for a bucket that the user owns already
        with the same countries.

        ``racks``: where its data may lie.
        """
        buckets, _ = self._planes()
        body = await texts_of(request, "name", "user", "countries")
        name, countries = body.get("name", ""), tuple(sorted(filter(None, body.get("countries", "").split(","))))
        if not bucket_name_valid(name):
            raise InvalidBucketName(BucketName=name)
        who = await self._user(body.get("user", ""))
        facts = {"owner": who.access_key, "countries": ",".join(countries)}
        async with recorded(self._services, request, "bucket.create", f"bucket:{name}", **facts) as found:
            try:
                made = await buckets.create(who, name, region=self._services.region, countries=countries)
            except BucketAlreadyOwnedByYou:
                made = await buckets.get(name)
                if made.countries != countries:
                    raise
            found["bucket"] = made.id.hex()
        racks = self._services.racks(made.countries) if self._services.racks is not None else []
        return web.json_response(
            {"bucket": made.name, "owner": who.display_name, "countries": list(made.countries), "racks": racks}
        )

    async def _usage(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.usage is None:
            raise NotHere
        after = request.query.get("after", "")
        found = await self._services.usage(await buckets.get(request.match_info["name"]), after)
        return web.json_response(
            {
                "objects": found.objects,
                "versions": found.versions,
                "bytes": found.size_bytes,
                "next_after": found.next_after,
            }
        )

    async def _lifecycle(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.lifecycle is None:
            raise NotHere
        return web.json_response(await self._services.lifecycle(await buckets.get(request.match_info["name"])))

    async def _inventories(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.inventories is None:
            raise NotHere
        return web.json_response(await self._services.inventories(await buckets.get(request.match_info["name"])))

    async def _bucket_quota(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        bucket = await buckets.get(request.match_info["name"])
        found = buckets.configuration_of(bucket).get(QUOTA) or Quota()
        return web.json_response({"bucket": bucket.name, "bytes": found.bytes, "objects": found.objects})

    async def _set_bucket_quota(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        change = self._services.set_bucket_quota
        if change is None:
            raise NotHere
        size, objects = await _limits_in(request)
        bucket = await buckets.get(request.match_info["name"])
        facts = {"bucket": bucket.id.hex(), "bytes": str(size), "objects": str(objects)}
        async with recorded(self._services, request, "quota.set", f"bucket:{bucket.name}", **facts):
            await change(bucket, size, objects)
        return web.json_response({"bucket": bucket.name, "bytes": size, "objects": objects})

    async def _bucket_copies(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        bucket = await buckets.get(request.match_info["name"])
        found = buckets.configuration_of(bucket).get(COPIES)
        return web.json_response({"bucket": bucket.name, "bytes": found.bytes if found is not None else None})

    async def _set_bucket_copies(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        change = self._services.set_bucket_copies
        if change is None:
            raise NotHere
        text = (await texts_of(request, "bytes")).get("bytes")
        if text is None:
            raise InvalidArgument("bytes is missing; empty: as the gateways are configured")
        bytes_max = _number(text, "bytes") if text else None
        if bytes_max is not None and bytes_max > SMALL_OBJECT_BYTES_MAX:
            raise InvalidArgument(f"no gateway keeps objects of more than {SMALL_OBJECT_BYTES_MAX} bytes as copies")
        bucket = await buckets.get(request.match_info["name"])
        facts = {"bucket": bucket.id.hex(), "bytes": text}
        async with recorded(self._services, request, "copies.set", f"bucket:{bucket.name}", **facts):
            await change(bucket, bytes_max)
        return web.json_response({"bucket": bucket.name, "bytes": bytes_max})

    async def _account_quota(self, request: web.Request) -> web.Response:
        _, users = self._planes()
        root = await account_named(users, request.match_info["name"])
        account = await users.accounts.get(root.user_id)
        found = {"bytes": account.bytes_max, "objects": account.objects_max}
        return web.json_response({"user": root.display_name, **found})

    async def _set_account_quota(self, request: web.Request) -> web.Response:
        _, users = self._planes()
        change = self._services.set_account_quota
        if change is None:
            raise NotHere
        size, objects = await _limits_in(request)
        root = await account_named(users, request.match_info["name"])
        facts = {"user_id": root.user_id, "bytes": str(size), "objects": str(objects)}
        async with recorded(self._services, request, "quota.set", f"user:{root.display_name}", **facts):
            await change(root.user_id, size, objects)
        return web.json_response({"user": root.display_name, "bytes": size, "objects": objects})

    async def _set_owner(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.set_owner is None:
            raise NotHere
        who = await self._user((await texts_of(request, "user")).get("user", ""))
        bucket = await buckets.get(request.match_info["name"])
        facts = {"bucket": bucket.id.hex(), "before": bucket.owner, "owner": who.user_id}
        async with recorded(self._services, request, "bucket.owner", f"bucket:{bucket.name}", **facts):
            await self._services.set_owner(bucket, who.user_id)
        return web.json_response({"bucket": bucket.name, "owner": who.display_name})

    async def _unlock(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.verify_unlock is None or self._services.unlock is None:
            raise NotHere
        order = self._services.verify_unlock((await texts_of(request, "order")).get("order", ""))
        bucket = await buckets.get(request.match_info["name"])
        if order.bucket != bucket.name:
            raise InvalidArgument(f"the order is for bucket {order.bucket!r}")
        facts = {"bucket": bucket.id.hex(), "version": order.version, "reason": order.reason[:REASON_CHARS_MAX]}
        async with recorded(self._services, request, "object.unlock", f"object:{order.bucket}/{order.key}", **facts):
            await self._services.unlock(bucket, order.key.encode(), order.version)
        return web.json_response({"bucket": order.bucket, "key": order.key, "version": order.version})

    async def _lost(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.lost_versions is None:
            raise NotHere
        bucket, key = await buckets.get(request.match_info["name"]), _key(request.query.get("key", ""))
        return web.json_response({"versions": await self._services.lost_versions(bucket, key)})

    async def _forget_lost(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        if self._services.forget_lost is None:
            raise NotHere
        body = await texts_of(request, "key", "count")
        key, count = _key(body.get("key", "")), body.get("count", "")
        if not (count.isascii() and count.isdigit() and len(count) < COUNT_CHARS_MAX):
            raise InvalidArgument("count is a number")
        bucket = await buckets.get(request.match_info["name"])
        target, facts = f"object:{bucket.name}/{key.decode('utf-8', 'replace')}", {"bucket": bucket.id.hex()}
        async with recorded(self._services, request, "object.forget", target, versions=count, **facts):
            await self._services.forget_lost(bucket, key, int(count))
        return web.json_response({"versions": int(count)})

    async def _delete(self, request: web.Request) -> web.Response:
        buckets, _ = self._planes()
        bucket = await buckets.get(request.match_info["name"])
        async with recorded(self._services, request, "bucket.delete", f"bucket:{bucket.name}", bucket=bucket.id.hex()):
            await buckets.delete(bucket)
        return web.json_response({"deleted": bucket.name})

    async def _user(self, named: str) -> Principal:
        """Finds a user by access key, else by name. So no user becomes another by choosing that one's key as a name.
        Raises InvalidArgument.
        """
        _, users = self._planes()
        known = await users.list_users()
        found = [who for who in known if who.access_key == named] or [who for who in known if who.display_name == named]
        if not found:
            raise InvalidArgument(f"there is no user {named!r}; `storaged user list` has the names")
        return found[0]


async def _limits_in(request: web.Request) -> tuple[int, int]:
    """Bytes and objects that a body asks for. Raises InvalidArgument."""
    body = await texts_of(request, "bytes", "objects")
    return _number(body.get("bytes", ""), "bytes"), _number(body.get("objects", ""), "objects")


def _number(text: str, name: str) -> int:
    """Raises InvalidArgument."""
    if not (text.isascii() and text.isdigit() and len(text) < COUNT_CHARS_MAX):
        raise InvalidArgument(f"{name} is a number")
    return int(text)


def _key(text: str) -> bytes:
    """Raises InvalidArgument."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidArgument("key is the key in hex") from None


def names_by_id(users: Iterable[Principal]) -> dict[str, list[str]]:
    """User id -> the names of its users: several while keys are exchanged."""
    found: dict[str, list[str]] = {}
    for who in users:
        found.setdefault(who.user_id, []).append(who.display_name)
    return found


def bucket_document(record: BucketRecord, names: dict[str, list[str]]) -> dict[str, Any]:
    """One bucket as JSON. ``owners``: the users with its owner's id; empty when all of them were removed."""
    return {
        "bucket": record.name,
        "id": record.id.hex(),
        "owner": record.owner,
        "owners": sorted(names.get(record.owner, [])),
        "created_ms": record.created_ms,
        "state": record.state,
        "formerly": record.formerly,
        "region": record.region,
        "countries": list(record.countries),
    }
