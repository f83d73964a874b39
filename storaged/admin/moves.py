"""Moves to where the layout in force wants things, for the operator (``cluster.move_settings``).

POST /v1/moves                          {job, paused: "true" | "false", pace}: what is not given stays as it is

``pace``: a number, 0 for none. Answers with the settings, as in the document of status.
"""

from __future__ import annotations

from aiohttp import web

from storaged.admin.body import NotHere, recorded, texts_of
from storaged.admin.ports import Services
from storaged.cluster.move_settings import document
from storaged.errors import InvalidArgument

PAUSED = {"true": True, "false": False}


class MoveAdministration:
    """Handlers over a gateway's services. A storage node answers NOT_HERE."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/moves", self._set)]

    async def _set(self, request: web.Request) -> web.Response:
        change = self._services.set_moves
        if change is None:
            raise NotHere
        body = await texts_of(request, "job", "paused", "pace")
        job = body.pop("job", "")
        try:
            paused = PAUSED[body["paused"]] if "paused" in body else None
            pace = int(body["pace"]) if "pace" in body else None
        except (KeyError, ValueError):
            raise InvalidArgument("paused is true or false, and pace is a number") from None
        if paused is None and pace is None:
            raise InvalidArgument("there is nothing to change: name paused or pace")
        async with recorded(self._services, request, "moves.set", f"job:{job}", **body) as found:
            settings = await change(job, paused=paused, pace=pace)
            found["revision"] = str(settings.revision)
        return web.json_response({"settings": document(settings)})
