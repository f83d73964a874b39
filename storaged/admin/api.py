"""The admin API: JSON over the Unix socket in the node's directory, and health over HTTP on loopback.

Only root and the node's own user may use the socket (``listener``).

    GET  /healthz /readyz /metrics          both listeners
    GET  /v1/status /v1/doctor /v1/jobs     Unix socket only, from here on
    GET  /v1/modules                        the modules of storaged that this process imported
    GET  /v1/where?bucket=&key=             key in hex
    GET  /v1/users   POST /v1/users   DELETE /v1/users/NAME
    ...  /v1/buckets                        see ``buckets``
    POST /v1/iam                            see ``iam``
    GET  /v1/layout  POST /v1/layout        the layout that was decided last; brings one into force
    GET  /v1/losses?disks=                  what the loss of disks would lose
    POST /v1/moves                          pauses and resumes moves, and sets their pace
    POST /v1/scrub   POST /v1/keys/backup   GET /v1/audit/witnessed?node=

A refusal is {"code", "message", "hint"} with the error's status.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from storaged.admin.body import NotHere, recorded, texts_of
from storaged.admin.buckets import BucketAdministration
from storaged.admin.hosts import local_hosts
from storaged.admin.iam import IamAdministration
from storaged.admin.layouts import LAYOUT_BODY_BYTES_MAX, LayoutAdministration
from storaged.admin.listener import AdminListener, SocketPeer
from storaged.admin.moves import MoveAdministration
from storaged.admin.place import SOCKET_NAME, bind_private
from storaged.admin.ports import Jobs, Services
from storaged.config import split_address
from storaged.errors import InvalidArgument, NotAllowed, NotFound, PortInUse, ServiceUnavailable, StoragedError
from storaged.objects.identity import names_of
from storaged.observe import Metrics, exposition
from storaged.passphrase import require_long

BODY_BYTES_MAX = 64 * 1024

log = structlog.get_logger("admin")


class AdminServer:
    """One node's admin API on its socket, and its health on a loopback port when ``listen`` is set."""

    def __init__(self, services: Services, metrics: Metrics) -> None:
        self._services = services
        self._metrics = metrics
        self._runners: list[web.AppRunner] = []

    async def start(self, directory: Path, listen: str) -> None:
        """Starts both listeners. Raises PortInUse."""
        private = self._application(body_bytes_max=LAYOUT_BODY_BYTES_MAX)
        private.add_routes(
            [
                web.get("/v1/status", self._status),
                web.get("/v1/doctor", self._doctor),
                web.get("/v1/jobs", self._jobs),
                web.get("/v1/modules", self._modules),
                web.get("/v1/where", self._where),
                web.get("/v1/users", self._list_users),
                web.post("/v1/users", self._add_user),
                web.delete("/v1/users/{name}", self._remove_user),
                *BucketAdministration(self._services).routes(),
                *IamAdministration(self._services).routes(),
                *LayoutAdministration(self._services).routes(),
                *MoveAdministration(self._services).routes(),
                web.post("/v1/scrub", self._scrub),
                web.post("/v1/keys/backup", self._backup),
                web.get("/v1/audit/witnessed", self._witnessed),
            ]
        )
        runner = await self._run(private)
        await AdminListener(runner, bind_private(directory / SOCKET_NAME), on_refusal=self._on_refusal).start()
        if listen:
            host, port = split_address(listen)
            runner = await self._run(self._application(local_hosts))
            try:
                await web.TCPSite(runner, host, port, reuse_address=True).start()
            except OSError as error:
                raise PortInUse(f"{listen}: {error.strerror or error}") from None

    async def close(self) -> None:
        for runner in reversed(self._runners):
            await runner.cleanup()
        self._runners.clear()

    async def _run(self, application: web.Application) -> web.AppRunner:
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=2.0)
        await runner.setup()
        self._runners.append(runner)
        return runner

    def _application(self, *more: Middleware, body_bytes_max: int = BODY_BYTES_MAX) -> web.Application:
        application = web.Application(client_max_size=body_bytes_max, middlewares=[_refusals, *more])
        application.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metric_text),
            ]
        )
        return application

    def _on_refusal(self, peer: SocketPeer) -> None:
        if self._services.trail is not None:
            self._services.trail.refused("admin.refused", NotAllowed.code, actor=peer.actor, target=SOCKET_NAME)

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"healthy": True})

    async def _readyz(self, _request: web.Request) -> web.Response:
        ready, reason = self._services.ready()
        return web.json_response({"ready": ready, "reason": reason}, status=200 if ready else 503)

    async def _metric_text(self, _request: web.Request) -> web.Response:
        self._metrics.gauge("storaged_ready").set(self._services.ready()[0])
        others = await self._services.other_samples() if self._services.other_samples is not None else ()
        return web.Response(
            body=exposition(self._metrics.registry, others), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(await self._services.status())

    async def _doctor(self, _request: web.Request) -> web.Response:
        return web.json_response({"checks": await self._services.doctor()})

    async def _modules(self, _request: web.Request) -> web.Response:
        """The modules that this process imported: it shows that a running storage node has no code
        that handles keys.
        """
        return web.json_response(
            {"modules": sorted(name for name in sys.modules if name.partition(".")[0] == "storaged")}
        )

    async def _where(self, request: web.Request) -> web.Response:
        if self._services.where is None:
            raise NotHere
        try:
            key = bytes.fromhex(request.query.get("key", ""))
        except ValueError:
            raise InvalidArgument("the key is written in hex") from None
        return web.json_response(await self._services.where(request.query.get("bucket", ""), key))

    def _need_jobs(self) -> Jobs:
        if self._services.jobs is None:
            raise NotHere
        return self._services.jobs

    async def _jobs(self, _request: web.Request) -> web.Response:
        return web.json_response(await self._need_jobs().jobs())

    async def _scrub(self, request: web.Request) -> web.Response:
        jobs = self._need_jobs()
        async with recorded(self._services, request, "scrub.start", "cluster"):
            nodes = await jobs.start_scrub()
        return web.json_response({"nodes": nodes})

    async def _list_users(self, _request: web.Request) -> web.Response:
        if self._services.users is None:
            raise NotHere
        found = await self._services.users.list_users()
        return web.json_response(
            {
                "users": [
                    {
                        **names_of(who.user_id, who.display_name),
                        "name": who.display_name,
                        "access_key": who.access_key,
                        "email": who.email,
                    }
                    for who in found
                ]
            }
        )

    async def _add_user(self, request: web.Request) -> web.Response:
        if self._services.users is None:
            raise NotHere
        body = await texts_of(request, "name", "access_key", "secret_key", "email", "user_id")
        name = body.pop("name", "")
        wanted = {field: body[field] for field in ("access_key", "user_id") if body.get(field)}
        async with recorded(self._services, request, "user.add", f"user:{name}", **wanted) as found:
            who, secret = await self._services.users.add(name, **body)
            found |= {"access_key": who.access_key, "user_id": who.user_id}
        log.info("user added", user=who.display_name, access_key=who.access_key)
        names = names_of(who.user_id, who.display_name)
        return web.json_response({**names, "access_key": who.access_key, "secret_key": secret})

    async def _remove_user(self, request: web.Request) -> web.Response:
        if self._services.users is None:
            raise NotHere
        name = request.match_info["name"]
        async with recorded(self._services, request, "user.remove", f"user:{name}") as found:
            who = await self._services.users.remove(name)
            found |= {"name": who.display_name, "access_key": who.access_key, "user_id": who.user_id}
        log.info("user removed", user=who.display_name, access_key=who.access_key)
        return web.json_response({"removed": who.display_name, "user_id": who.user_id, "access_key": who.access_key})

    async def _backup(self, request: web.Request) -> web.Response:
        if self._services.key_backup is None:
            raise NotHere
        body = await texts_of(request, "passphrase")
        passphrase = body.get("passphrase", "")
        require_long(passphrase)
        async with recorded(self._services, request, "key.backup", "keyring") as found:
            keyring, content = await self._services.key_backup(passphrase)
            found["keyring"] = keyring
        log.info("keyring backed up", keyring=keyring)
        return web.json_response({"keyring": keyring, "backup": base64.b64encode(content).decode()})

    async def _witnessed(self, request: web.Request) -> web.Response:
        """All that the cluster knows of one node's audit log: each witness's view, and the registers of versions with
        protocol 2.
        """
        if self._services.witnessed is None or self._services.checkpoints is None:
            raise NotHere
        witnesses = await self._services.witnessed(request.query.get("node", ""))
        try:
            found = [base64.b64encode(one).decode() for one in await self._services.checkpoints()]
        except ServiceUnavailable as error:
            return web.json_response(
                {
                    "witnesses": witnesses,
                    "checkpoints": [],
                    "reason": error.message,
                    "authority": self._services.authority,
                }
            )
        return web.json_response(
            {"witnesses": witnesses, "checkpoints": found, "reason": "", "authority": self._services.authority}
        )


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turns errors into documents. An unexpected error is logged here and answered without its details."""
    try:
        return await handler(request)
    except StoragedError as error:
        document: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
        status = error.status if error.status >= 400 else 500
        return web.json_response(document, status=status)
    except web.HTTPException as error:
        return web.json_response(
            {
                "code": NotFound.code,
                "message": f"{request.method} {request.path}: {error.reason}",
                "hint": NotFound.hint,
            },
            status=error.status,
        )
    except Exception:
        log.exception("an admin request failed", path=request.path)
        return web.json_response(
            {"code": "InternalError", "message": "an internal error occurred; the node's log has it", "hint": ""},
            status=500,
        )
