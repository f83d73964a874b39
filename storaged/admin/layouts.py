"""Layouts, for the operator.

GET  /v1/layout                         {layout, epoch, in_force}: the layout that was decided last
POST /v1/layout                         {layout}: brings it into force
GET  /v1/losses?disks=A,B               what would be lost if these disks were lost for good

A layout is an encoded SignedLayout, in base64.
"""

from __future__ import annotations

import base64
import binascii

from aiohttp import web
from msgspec import MsgspecError

from storaged.admin.body import NotHere, recorded, texts_of
from storaged.admin.ports import LayoutDesk, Services
from storaged.cluster.layout import Layout
from storaged.cluster.signed_layout import LAYOUT_BYTES_MAX, SignedLayout
from storaged.errors import InvalidArgument
from storaged.wire import decode, encode

LAYOUT_BODY_BYTES_MAX = 2 * LAYOUT_BYTES_MAX


class LayoutAdministration:
    """Handlers over a gateway's services. A storage node answers NOT_HERE."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/layout", self._newest),
            web.post("/v1/layout", self._apply),
            web.get("/v1/losses", self._losses),
        ]

    @property
    def _desk(self) -> LayoutDesk:
        if self._services.layouts is None:
            raise NotHere
        return self._services.layouts

    async def _newest(self, _request: web.Request) -> web.Response:
        signed, in_force = await self._desk.newest()
        epoch = decode(signed.payload, Layout).epoch
        text = base64.b64encode(encode(signed)).decode()
        return web.json_response({"layout": text, "epoch": epoch, "in_force": in_force})

    async def _apply(self, request: web.Request) -> web.Response:
        desk = self._desk
        body = await texts_of(request, "layout")
        try:
            signed = decode(base64.b64decode(body.get("layout", ""), validate=True), SignedLayout)
            epoch = decode(signed.payload, Layout).epoch
        except (MsgspecError, binascii.Error):
            raise InvalidArgument(
                "this is no signed layout: apply AUTHORITY/layouts/layout-NUMBER.signed, as `storaged cluster layout`"
                " says"
            ) from None
        async with recorded(self._services, request, "layout.apply", f"layout:{epoch}") as found:
            done = await desk.apply(signed)
            found |= {"accepted": ",".join(done["accepted"])}
        return web.json_response(done)

    async def _losses(self, request: web.Request) -> web.Response:
        if self._services.losses is None:
            raise NotHere
        disks = [disk for disk in request.query.get("disks", "").split(",") if disk]
        if not disks:
            raise InvalidArgument("no disk is named")
        return web.json_response(await self._services.losses(disks))
