"""The units are hardened, the examples are valid, and sd_notify speaks the protocol."""

from __future__ import annotations

import asyncio
import configparser
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storaged import config
from storaged.node.notify import Notifier

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = ("storaged@.service", "storaged-gateway.service")


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


@pytest.mark.parametrize("name", UNITS)
def test_the_units_say_what_the_daemon_does(name: str) -> None:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "systemd" / name).read_text())
    service = dict(parser["Service"])
    assert service["Type"] == "notify-reload"
    assert int(service["WatchdogSec"]) > 0
    assert " run /etc/storaged/" in service["ExecStart"]
    assert ("LoadCredentialEncrypted" in service) == ("gateway" in name)


def service_of(name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "systemd" / name).read_text())
    return dict(parser["Service"])


def test_gateways_and_storage_nodes_are_two_users_that_share_nothing() -> None:
    storage, gateway = (service_of(name) for name in UNITS)
    assert (storage["User"], storage["Group"]) == ("storaged", "storaged")
    assert (gateway["User"], gateway["Group"]) == ("storaged-gateway", "storaged-gateway")
    for service in (storage, gateway):
        assert "SupplementaryGroups" not in service
        assert (service["StateDirectoryMode"], service["UMask"]) == ("0700", "0077")
    lines = (DEPLOY / "systemd" / "storaged.sysusers.conf").read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("u ")} == {storage["User"], gateway["User"]}
    assert not [line for line in lines if line.startswith("m ")], "a membership would join them"


def test_the_guide_gives_each_user_its_own_and_says_how_an_older_installation_changes_over() -> None:
    guide = (DEPLOY / "README.md").read_text()
    assert "chown -R storaged:storaged /etc/storaged/n1" in guide
    assert "chown -R storaged-gateway:storaged-gateway /etc/storaged/gateway /var/lib/storaged/gateway" in guide
    assert "-u storaged env" not in guide


@pytest.mark.parametrize("name", ["storage.toml", "gateway.toml"])
def test_the_example_configurations_are_accepted(name: str) -> None:
    loaded = config.load(DEPLOY / "examples" / name)
    assert loaded.gateway == (name == "gateway.toml")


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.settimeout(5)
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


async def test_a_watchdog_meant_for_another_process_is_not_fed_and_no_manager_is_fine() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"})
    notifier.ready("x")
    await notifier.feed_watchdog()
    assert notifier.watchdog_s == 0


def test_an_abstract_address_is_understood() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("abstract sockets are Linux's")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0storaged-test-{os.getpid()}")
        listening.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": f"@storaged-test-{os.getpid()}"})
        notifier.stopping()
        assert listening.recv(100) == b"STOPPING=1"
        notifier.close()


def test_the_credential_that_opens_the_keyring_is_never_readable_by_others_while_it_is_made() -> None:
    readme = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    made = [line for line in readme.splitlines() if "/dev/urandom" in line]
    assert made
    assert all(line.startswith("(umask 077; ") for line in made)
