"""What the configuration reader accepts, and how it lists mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged import config
from storaged.errors import ConfigInvalid
from storaged.units import MIB

STORAGE = """
[node]
name = "n1"
directory = "."
roles = ["storage"]
[cluster]
identity = "identity"
[[disks]]
id = "0123456789abcdef"
directory = "d1"
[rpc]
listen = "127.0.0.1:7400"
"""

GATEWAY = """
[node]
name = "gateway"
directory = "state"
roles = ["gateway"]
[cluster]
identity = "/etc/storaged/identity"
[keys]
keyring = "keys/keyring"
credential = "$CREDENTIALS_DIRECTORY/keyring"
[limits]
rpc_inflight_bytes_max = "128 MiB"
drain_s = 5
"""


def mistakes_of(text: str) -> list[config.Mistake]:
    found, mistakes = config.parse(text, Path("/base"))
    assert (found is None) == bool(mistakes)
    return mistakes


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "n1" / "config.toml"
    file.parent.mkdir()
    file.write_text(STORAGE)
    loaded = config.load(file)
    assert loaded.disks[0].directory == str(tmp_path / "n1" / "d1")
    assert loaded.node.directory == str(tmp_path / "n1")
    assert loaded.path == str(file)
    assert loaded.storage
    assert not loaded.gateway


def test_sizes_credentials_and_whole_numbers_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x")
    loaded, mistakes = config.parse(GATEWAY, Path("/base"))
    assert mistakes == []
    assert loaded is not None
    assert loaded.keys.credential == "/run/credentials/x/keyring"
    assert loaded.limits.rpc_inflight_bytes_max == 128 * MIB
    assert loaded.limits.drain_s == 5.0
    assert loaded.s3.region == "eu-fr-1"


def test_five_mistakes_are_all_listed_with_their_lines_and_suggestions(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[node]\nname = "N 1"\ndirectory = "."\nroles = ["storge"]\n'
        '[cluster]\nidentity = 7\n[rpc]\nlissten = "127.0.0.1:1"\n[log]\nlevel = "infos"\n'
    )
    with pytest.raises(ConfigInvalid) as caught:
        config.load(file)
    text = str(caught.value)
    assert "5 mistakes" in text
    for line, word in (
        (2, "name"),
        (4, "did you mean 'storage'?"),
        (6, "wants text"),
        (8, "did you mean 'listen'?"),
        (10, "did you mean 'info'?"),
    ):
        assert any(f"line {line}:" in row and word in row for row in text.splitlines()), text


def test_a_line_that_is_not_toml_does_not_hide_the_other_mistakes() -> None:
    found = mistakes_of(STORAGE.replace('name = "n1"', "name = n1").replace('"127.0.0.1:7400"', '"127.0.0.1:99999"'))
    assert [mistake.line for mistake in found if "not TOML" in mistake.message] == [3]
    assert any("99999" in mistake.message for mistake in found)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (('listen = "127.0.0.1:7400"', 'listen = "7400"'), "HOST:PORT"),
        (('[rpc]\nlisten = "127.0.0.1:7400"', ""), "rpc.listen"),
        (('id = "0123456789abcdef"', 'id = "xyz"'), "disk id"),
        (('roles = ["storage"]', "roles = []"), "is empty"),
        (('[cluster]\nidentity = "identity"', ""), "[cluster] is missing"),
        (("[rpc]", '[keys]\nkeyring = "k"\ncredential = "c"\n[rpc]'), "never has keys"),
        (("[rpc]", '[[disks]]\nid = "0123456789abcdef"\ndirectory = "d2"\n[rpc]'), "also that of disk 1"),
        (("[rpc]", '[admin]\nlisten = "0.0.0.0:8334"\n[rpc]'), "loopback"),
        (("[rpc]", '[limits]\nsegment_bytes = "1 KiB"\n[rpc]'), "outside"),
        (("[rpc]", '[limits]\nsegment_bytes = "1 lot"\n[rpc]'), "not a size"),
        (("[rpc]", "[limits]\nreserve_bytes = -1\n[rpc]"), "negative"),
        (("[rpc]", "[limits]\ndrain_s = true\n[rpc]"), "a number"),
        (("[rpc]", '[s3]\ntls_key = "k"\n[rpc]'), "both"),
        (("[rpc]", "[s3]\nworkers = 2\n[rpc]"), "a node with disks is one process"),
        (("[rpc]", "[s3]\nworkers = 0\n[rpc]"), "outside 1 .. 64"),
        (("[rpc]", "[audit]\nkeep_days = 30\n[rpc]"), "outside 180 .. 36500"),
        (("[rpc]", "[rpcs]"), "did you mean 'rpc'"),
    ],
)
def test_each_mistake_is_named(change: tuple[str, str], word: str) -> None:
    assert change[0] in STORAGE
    found = mistakes_of(STORAGE.replace(*change))
    assert any(word in mistake.message for mistake in found), found


def test_a_gateway_wants_exactly_one_thing_that_opens_its_keyring() -> None:
    assert any("one of" in m.message for m in mistakes_of(GATEWAY.replace("[limits]", 'passphrase = "p"\n[limits]')))
    assert any(
        "one of" in m.message for m in mistakes_of(GATEWAY.replace('credential = "$CREDENTIALS_DIRECTORY/keyring"', ""))
    )


@pytest.mark.parametrize("days", [0, 180, 4000])
def test_an_audit_log_is_kept_six_months_or_longer_or_for_ever(tmp_path: Path, days: int) -> None:
    path = tmp_path / "config.toml"
    path.write_text(STORAGE.replace("[rpc]", f"[audit]\nkeep_days = {days}\n[rpc]"))
    assert config.load(path).audit.keep_days == days


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="no such file"):
        config.load(tmp_path / "absent.toml")


def check_listed(mistakes: list[config.Mistake], text: str) -> None:
    """Each says something, of a line of the text or of what is missing, which comes last; nothing is said twice."""
    assert all(mistake.message.strip() for mistake in mistakes)
    assert all(0 <= mistake.line <= text.count("\n") + 1 for mistake in mistakes)
    places = [mistake.line or text.count("\n") + 2 for mistake in mistakes]
    assert places == sorted(places)
    assert len(set(mistakes)) == len(mistakes)


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_otherwise_than_by_listing_mistakes(text: str) -> None:
    check_listed(mistakes_of(text), text)


@given(st.lists(st.sampled_from(STORAGE.splitlines()), max_size=14).map("\n".join))
def test_shuffled_lines_are_listed_or_accepted(text: str) -> None:
    check_listed(mistakes_of(text), text)
