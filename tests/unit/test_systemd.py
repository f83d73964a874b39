"""The units are hardened, the examples are valid, and sd_notify speaks the protocol."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from storaged import config
from storaged.node.notify import Notifier

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = ("storaged@.service", "storaged-gateway.service")


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


async def test_a_watchdog_meant_for_another_process_is_not_fed_and_no_manager_is_fine() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"})
    notifier.ready("x")
    await notifier.feed_watchdog()
    assert notifier.watchdog_s == 0


def test_the_credential_that_opens_the_keyring_is_never_readable_by_others_while_it_is_made() -> None:
    readme = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    made = [line for line in readme.splitlines() if "/dev/urandom" in line]
    assert made
    assert all(line.startswith("(umask 077; ") for line in made)
