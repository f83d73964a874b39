"""Users, groups, roles, policies and keys of an account, for the operator: IAM's own actions.

POST /v1/iam                            {account, action, and the action's parameters, by the names that IAM has}

``account``: the name, an access key or the id of its own user. The operator may do all. The answer is IAM's, as a
document.
"""

from __future__ import annotations

import json
import re
from typing import Any

import structlog
from aiohttp import web

from storaged.admin.body import NotHere, recorded
from storaged.admin.ports import Services
from storaged.errors import InvalidArgument
from storaged.objects.api import Principal, Users

READS = ("Get", "List")
ACTION = re.compile(r"[A-Za-z]{1,64}")
NAMES = (
    "UserName", "GroupName", "RoleName", "PolicyName", "PolicyArn", "AccessKeyId", "Status", "VersionId", "NewUserName",
    "NewGroupName", "NewPath", "Path",
)  # fmt: skip
"""Parameters that the audit log has."""

log = structlog.get_logger("admin")


class IamAdministration:
    """Handlers over a gateway's services. A storage node answers NOT_HERE."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/iam", self._perform)]

    async def _perform(self, request: web.Request) -> web.Response:
        perform, users = self._services.iam, self._services.users
        if perform is None or users is None:
            raise NotHere
        body = await _texts(request)
        named, action = body.pop("account", ""), body.pop("action", "")
        root = await account_named(users, named)
        if action.startswith(READS):
            return web.json_response(await perform(root, action, body))
        if not ACTION.fullmatch(action):
            raise InvalidArgument("action is the name of an action of IAM")
        facts = {name: body[name][:512] for name in NAMES if name in body}
        target = f"account:{root.user_id}"
        async with recorded(self._services, request, "iam.change", target, action=action, **facts) as found:
            answer = await perform(root, action, body)
            if made := answer.get("AccessKey", {}).get("AccessKeyId"):
                found["AccessKeyId"] = made
        log.info("account changed", account=root.display_name, action=action, **facts)
        return web.json_response(answer)


async def account_named(users: Users, named: str) -> Principal:
    """The own user of an account: by access key, id, else by name, so that no user becomes another by choosing that
    one's key as a name. Raises InvalidArgument.
    """
    known = await users.list_users()
    for attribute in ("access_key", "user_id", "display_name"):
        for who in known:
            if named and getattr(who, attribute) == named:
                return who
    raise InvalidArgument(f"there is no user {named!r}; `storaged user list` has the names")


async def _texts(request: web.Request) -> dict[str, str]:
    """Raises InvalidArgument."""
    try:
        document: Any = json.loads(await request.read())
    except ValueError:
        raise InvalidArgument("the body is not JSON") from None
    if not isinstance(document, dict) or not all(isinstance(value, str) for value in document.values()):
        raise InvalidArgument("the body is an object whose values are texts")
    return document
