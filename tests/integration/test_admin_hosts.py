"""The port of health and metrics answers to addresses and localhost, so that no web page's name can come to mean it."""

from __future__ import annotations

import socket
from pathlib import Path

import aiohttp
import pytest

from storaged.admin.api import AdminServer
from storaged.admin.hosts import names_this_machine
from storaged.observe import Metrics
from tests.integration.test_admin_api import Node


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:9100", "localhost", "LocalHost:80", "[::1]", "[::1]:9100", "10.0.0.7:80"]
)
def test_addresses_and_localhost_are_this_machine(host: str) -> None:
    assert names_this_machine(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:9100",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[evil]",
        "[",
        "loc\u212alhost",
    ],
)
def test_other_names_are_not(host: str) -> None:
    assert not names_this_machine(host)


async def test_a_page_whose_name_means_this_machine_is_not_answered(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = AdminServer(Node().services(gateway=True), Metrics())
    await server.start(tmp_path, f"127.0.0.1:{port}")
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            for host, status in (("evil.example", 421), (f"evil.example:{port}", 421), (f"localhost:{port}", 200)):
                for path in ("/healthz", "/metrics"):
                    async with client.get(path, headers={"Host": host}) as answer:
                        assert answer.status == status
    finally:
        await server.close()
