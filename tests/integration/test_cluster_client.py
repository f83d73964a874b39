"""The S3 client that tests of a trial cluster use."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError

from tests.cluster import Cluster
from tests.patience import GUARD_S


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_client_sends_a_request_as_often_as_it_was_asked_to(tmp_path: Path, attempts: int) -> None:
    """One that repeats a write by itself would take the first one's effect for that of another client."""
    asked: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = {"access_key": "a", "secret_key": "s", "region": "eu-fr-1", "endpoint": endpoint}
        client = Cluster(tmp_path / "none", settings=settings).boto3(
            **({} if attempts == 1 else {"attempts": attempts})
        )
        with pytest.raises(BotoCoreError, match="Connection was closed"):
            client.put_object(Bucket="bucket", Key="key", Body=b"x", IfNoneMatch="*")
        listener.shutdown(socket.SHUT_RDWR)
    server.join(GUARD_S)
    assert [request.split(b" ", 1)[0] for request in asked] == [b"PUT"] * attempts
