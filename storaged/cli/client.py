"""A client of the admin API over its Unix socket.

It uses the HTTP client of the standard library, which imports fast.
"""

from __future__ import annotations

import http.client
import json
import os
import pwd
import socket
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storaged.admin.place import SOCKET_NAME, short_path
from storaged.cli.target import gateway_directory
from storaged.errors import AdminNotAllowed, NotRunning, OperatorError, every_error


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with short_path(self._path) as name:
            self.sock.connect(name)


class RemoteRefusal(OperatorError):
    """The node refused; carries the code and hint of its error."""

    def __init__(self, code: str, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # what `report` prints is the remote error's, not this class's
        self.hint = hint  # type: ignore[misc]
        self.exit_code = exit_code  # type: ignore[misc]


def _not_allowed(path: Path, *, denied: bool) -> AdminNotAllowed | None:
    """The error for a socket of another user; None where this user may use it.

    Only root and the owner may. The mode of the directory refuses the others, or the node does.
    """
    try:
        owner = path.stat().st_uid
    except OSError:
        return AdminNotAllowed(f"{path} is not this user's") if denied else None
    if os.geteuid() in (0, owner):
        return None
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    return AdminNotAllowed(f"{path} is of the user {name}")


def request(
    node_directory: Path,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: Any = None,
    timeout_s: float = 30.0,
) -> Any:
    """Sends a request to one node's admin API and returns the JSON document of the answer.

    Raises NotRunning when no process listens, AdminNotAllowed, and RemoteRefusal with the node's own code and hint.
    """
    connection = _UnixConnection(node_directory / SOCKET_NAME, timeout_s)
    target = path + ("?" + urllib.parse.urlencode(query) if query else "")
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, target, payload, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    except (
        FileNotFoundError,
        ConnectionRefusedError,
        ConnectionResetError,
        BrokenPipeError,
        http.client.RemoteDisconnected,
        PermissionError,
    ) as error:
        if (
            refusal := _not_allowed(node_directory / SOCKET_NAME, denied=isinstance(error, PermissionError))
        ) is not None:
            raise refusal from None
        raise NotRunning(f"nothing answers in {node_directory}") from None
    except TimeoutError:
        raise NotRunning(f"the node in {node_directory} did not answer within {timeout_s:.0f} s") from None
    finally:
        connection.close()
    try:
        document = json.loads(text)
    except ValueError:
        raise OperatorError(
            f"the node in {node_directory} answered {answer.status} with something that is not JSON"
        ) from None
    if answer.status >= 400 and "code" in document:
        known = next((kind for kind in every_error() if kind.code == document["code"]), OperatorError)
        raise RemoteRefusal(document["code"], document["message"], document.get("hint", ""), known.exit_code)
    return document


def gateway(directory: Path, method: str, path: str, **options: Any) -> Any:
    """``request`` to the cluster's gateway."""
    return request(gateway_directory(directory), method, path, **options)
