"""The units are hardened, the examples are valid, and sd_notify speaks the protocol.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storaged.config import DiskSection
from storaged.node.admission import WAITING
from storaged.node.daemon import tell_waits
from storaged.node.disks import ADMISSION, Disks
from storaged.node.notify import Notifier
from tests.patience import GUARD_S
from tests.unit.test_systemd import DEPLOY, UNITS


@pytest.mark.parametrize("name", UNITS)
def test_the_units_are_exposed_no_more_than_1_5(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / name.replace("@", "@n1")
    copy.write_text((DEPLOY / "systemd" / name).read_text())
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(copy)], capture_output=True, text=True, check=False
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 1.5, done.stdout


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.settimeout(GUARD_S)
    return listening


async def test_readiness_reload_stop_and_watchdog_are_told_to_the_manager(manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(environ)
    assert environ == {}
    notifier.ready("listening")
    notifier.reloading()
    notifier.stopping()
    feeding = asyncio.create_task(notifier.feed_watchdog())
    await asyncio.sleep(0)
    assert manager.recv(4096) == b"READY=1\nSTATUS=listening"
    assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert manager.recv(4096) == b"STOPPING=1"
    assert manager.recv(4096) == b"WATCHDOG=1"
    feeding.cancel()
    await asyncio.gather(feeding, return_exceptions=True)
    notifier.close()


async def test_what_disks_wait_for_is_told_to_the_manager(manager: socket.socket) -> None:
    notifier, disks = Notifier({"NOTIFY_SOCKET": manager.getsockname()}), Disks()
    disks.refuse(DiskSection("d1", "/srv/d1"), WAITING, "no answer yet from n2")
    telling = asyncio.create_task(tell_waits(disks, notifier, "storage of cluster c1"))
    await asyncio.sleep(0)
    assert manager.recv(4096) == b"STATUS=1 disk waits: no answer yet from n2"
    disks.healths["d1"].clear(ADMISSION)
    assert (await asyncio.to_thread(manager.recv, 4096)) == b"STATUS=storage of cluster c1"
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)
    notifier.close()


def test_an_abstract_address_is_understood() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0storaged-test-{os.getpid()}")
        listening.settimeout(GUARD_S)
        notifier = Notifier({"NOTIFY_SOCKET": f"@storaged-test-{os.getpid()}"})
        notifier.stopping()
        assert listening.recv(100) == b"STOPPING=1"
        notifier.close()
