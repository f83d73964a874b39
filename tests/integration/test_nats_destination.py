"""NATS as a destination of notifications, with its own client, against a server double."""

from __future__ import annotations

from pathlib import Path

import pytest

from storaged.config import NotificationSection
from storaged.errors import ConfigInvalid
from storaged.node import destinations
from storaged.node.destinations import ConfiguredDestinations
from storaged.objects.destinations import DeliveryFailed
from tests.doubles.nats_server import NatsServer

ARN = "arn:storaged:sqs::stream:nats"


def test_without_its_client_a_destination_of_nats_is_a_mistake_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(destinations, "nats", None)
    with pytest.raises(ConfigInvalid, match=r"storaged\[nats\]"):
        ConfiguredDestinations([NotificationSection("stream", "nats://127.0.0.1:4222/events")])


async def test_an_event_is_acknowledged_by_the_stream(tmp_path: Path) -> None:
    pytest.importorskip("nats")
    (tmp_path / "token").write_text("the token\n")
    server = NatsServer("the token")
    port = await server.start()
    url, secret = f"nats://127.0.0.1:{port}/storaged.events", str(tmp_path / "token")
    found = ConfiguredDestinations([NotificationSection("stream", url, secret, timeout_s=20)])
    assert found.knows(ARN)
    await found.send(ARN, b"one")
    assert server.got == [("storaged.events", b"one")]
    await found.close()
    await server.close()


@pytest.mark.slow
async def test_without_an_acknowledgement_the_event_is_sent_again_and_then_waits() -> None:
    pytest.importorskip("nats")
    server = NatsServer()
    port = await server.start()
    found = ConfiguredDestinations([NotificationSection("stream", f"nats://127.0.0.1:{port}/e", timeout_s=5.0)])
    server.silent = 1
    await found.send(ARN, b"one")
    assert len(server.got) >= 2, "once more, or twice on a slow machine"
    assert set(server.got) == {("e", b"one")}
    before = len(server.got)
    server.without_stream = True
    with pytest.raises(DeliveryFailed):
        await found.send(ARN, b"two")
    assert len(server.got) == before
    await found.close()
    await server.close()


async def test_a_server_that_is_not_there_fails_the_delivery_and_may_come_later() -> None:
    pytest.importorskip("nats")
    server = NatsServer()
    port = await server.start()
    await server.close()
    found = ConfiguredDestinations([NotificationSection("stream", f"nats://127.0.0.1:{port}/e", timeout_s=1.0)])
    with pytest.raises(DeliveryFailed):
        await found.send(ARN, b"one")
    await found.close()
