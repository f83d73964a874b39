"""From nothing to folders that are copied to servers; keys that are made once; and errors that say what to do."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import msgspec
import pytest

from storaged import config
from storaged.cli import create
from storaged.cli.main import main
from storaged.cli.operate import explained
from storaged.cluster import identity, issuing, signed_layout
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.policy import EU_LAW, Policy, policy_of
from storaged.cluster.rpc import faults
from storaged.errors import (
    FileExists,
    JurisdictionRefused,
    KeyringMismatch,
    OperatorError,
    WrongPassphrase,
    every_error,
)
from storaged.keys import Argon2Cost, Credential, backup, create_keyring, open_keyring
from storaged.wire import decode, encode
from tests.worlds.authority_folder import call, issue_three


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    place = tmp_path / "authority"
    call("cluster", "create", str(place), "--cluster", "eu-1")
    return place


def test_folders_hold_a_certificate_a_checked_configuration_and_the_signed_layout(authority: Path) -> None:
    issue_three(authority)
    call("cluster", "layout", str(authority))
    loaded = config.load(authority / "nodes" / "n2" / "config.toml")
    assert [disk.directory for disk in loaded.disks] == ["/srv/disk1", "/srv/disk2"]
    own = identity.load_identity(Path(loaded.cluster.identity))
    assert (own.name, own.cluster, own.peer.rack, own.peer.roles) == ("n2", "eu-1", "b", ("storage",))
    signed = decode((Path(loaded.cluster.identity) / create.LAYOUT_NAME).read_bytes(), signed_layout.SignedLayout)
    layout = signed_layout.verify_layout(signed, own.administration, "eu-1")
    assert layout.epoch == 1
    assert layout.domain_kind == "rack"
    assert [disk.id for disk in layout.disks if disk.node == "n2"] == [disk.id for disk in loaded.disks]
    assert [disk.weight for disk in layout.disks] == [1000, 4000] * 3
    assert len(layout.seeds) == 3
    assert config.load(authority / "nodes" / "gateway" / "config.toml").gateway


def test_countries_and_jurisdictions_of_a_cluster_are_in_its_signed_layout_and_bind_every_node(tmp_path: Path) -> None:
    place = tmp_path / "authority"
    call("cluster", "create", str(place), "--cluster", "eu-1", "--countries", "FR, DE", "--jurisdictions", "FR")
    issue_three(place)
    for rack, jurisdiction, said in (
        ("IT/mil/a", "FR", "IT is not among the countries allowed here: DE, FR"),
        ("FR/par1/d", "HU", "HU is not among the jurisdictions allowed here: FR"),
        ("DE/fra/a", "", "DE is not among the jurisdictions allowed here: FR"),
    ):
        with pytest.raises(JurisdictionRefused, match=said):
            call(
                "cluster",
                "issue",
                str(place),
                "other",
                "--rack",
                rack,
                "--roles",
                "gateway",
                "--jurisdiction",
                jurisdiction,
            )
    call("cluster", "issue", str(place), "other", "--rack", "DE/fra/a", "--roles", "gateway", "--jurisdiction", "FR")
    call("cluster", "layout", str(place))
    own = identity.load_identity(place / "nodes/n1/identity")
    layout = signed_layout.verify_layout(
        decode((own.directory / create.LAYOUT_NAME).read_bytes(), signed_layout.SignedLayout),
        own.administration,
        "eu-1",
    )
    assert (layout.countries, layout.jurisdictions) == (("DE", "FR"), ("FR",))
    policy = policy_of(layout)
    policy.admit(own.peer)
    for changed in ({"jurisdiction": "HU"}, {"country": "IT"}, {"jurisdiction": ""}):
        with pytest.raises(JurisdictionRefused):
            policy.admit(own.peer._replace(**changed))


def test_a_plan_whose_nodes_leave_its_countries_gets_no_layout(authority: Path) -> None:
    issue_three(authority)
    plan = create.load_plan(authority)
    for narrowed, said in (
        ({"countries": ("DE",)}, "FR is not among the countries"),
        ({"jurisdictions": ("DE",)}, "FR is not among the jur"),
    ):
        for name, allowed in narrowed.items():
            create.save_plan(authority, msgspec.structs.replace(plan, **{name: allowed}))
        with pytest.raises(JurisdictionRefused, match=said):
            call("cluster", "layout", str(authority))


@pytest.mark.parametrize("option", ["--countries", "--jurisdictions"])
def test_a_cluster_is_not_made_for_countries_outside_the_union(tmp_path: Path, option: str) -> None:
    for outside in ("CH", "fr", "FR,US"):
        with pytest.raises(JurisdictionRefused):
            call("cluster", "create", str(tmp_path / "authority"), option, outside)
    assert not (tmp_path / "authority").exists()


def test_a_layout_from_before_it_had_jurisdictions_allows_all_of_the_union() -> None:
    """Its message ends with the number of replicas, or before."""
    fields = ["c", 1, [], [], [], "4+2", ["FR"], 3]
    layout = decode(encode(fields), Layout)
    assert (layout.countries, layout.jurisdictions) == (("FR",), ())
    assert policy_of(layout) == Policy(["FR"], EU_LAW)
    assert policy_of(decode(encode(fields[:6]), Layout)) == Policy()


def test_private_files_are_readable_by_their_owner_alone(authority: Path) -> None:
    issue_three(authority)
    for path in (
        authority / "authority.key",
        authority / "administration.key",
        authority / "nodes/n1/identity/node.key",
        authority / "nodes/n1/config.toml",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in (authority, authority / "nodes/n1", authority / "nodes/n1/identity"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_a_renewed_node_keeps_its_disks(authority: Path) -> None:
    issue_three(authority)
    before = next(node for node in create.load_plan(authority).nodes if node.name == "n1").disks
    call(
        "cluster",
        "issue",
        str(authority),
        "n1",
        "--rack",
        "FR/par1/a",
        "--roles",
        "storage",
        "--address",
        "10.0.1.1:7400",
    )
    assert next(node for node in create.load_plan(authority).nodes if node.name == "n1").disks == before
    with pytest.raises(OperatorError, match="already"):
        call(
            "cluster",
            "issue",
            str(authority),
            "n1",
            "--rack",
            "FR/par1/a",
            "--roles",
            "storage",
            "--address",
            "h:1",
            "--disk",
            "/x",
        )


def test_a_member_that_is_issued_again_keeps_the_configuration_of_its_server(authority: Path) -> None:
    issue_three(authority)
    folder = authority / "nodes" / "n1"
    before = (folder / "identity" / "node.crt").read_bytes()
    call(
        "cluster",
        "issue",
        str(authority),
        "n1",
        "--rack",
        "FR/par1/a",
        "--roles",
        "storage",
        "--address",
        "10.0.9.1:7400",
    )
    assert (folder / "identity" / "node.crt").read_bytes() != before
    assert not (folder / "config.toml").exists()
    assert 'listen = "10.0.9.1:7400"' in (folder / "config.issued.toml").read_text()


def test_a_second_layout_asks_for_no_folder_of_a_node_that_has_one(
    authority: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    issue_three(authority)
    capsys.readouterr()
    call("cluster", "layout", str(authority))
    assert capsys.readouterr().out.count("nodes/") == 4
    call("cluster", "issue", str(authority), "gw2", "--rack", "FR/par1/a", "--roles", "gateway")
    capsys.readouterr()
    call("cluster", "layout", str(authority))
    shown = capsys.readouterr().out
    assert (shown.count("nodes/"), shown.count("nodes/gw2"), shown.count("layout.signed")) == (1, 1, 1)


def test_issued_nodes_serve_health_and_metrics_on_loopback(authority: Path) -> None:
    issue_three(authority)
    listens = {name: config.load(authority / "nodes" / name / "config.toml").admin.listen for name in ("n1", "gateway")}
    assert listens == {"n1": "127.0.0.1:8335", "gateway": "127.0.0.1:8334"}
    call("cluster", "issue", str(authority), "n4", "--rack", "FR/par1/a", "--roles", "storage", "--address", "h:1", "--disk", "/d",  # noqa: E501
         "--admin", "none")  # fmt: skip
    assert config.load(authority / "nodes" / "n4" / "config.toml").admin.listen == ""
    with pytest.raises(OperatorError, match="--admin"):
        call(
            "cluster", "issue", str(authority), "n5", "--rack", "FR/par1/a", "--roles", "gateway", "--admin", "nowhere"
        )


def test_a_gateway_with_an_address_can_be_called_by_others(authority: Path) -> None:
    call(
        "cluster",
        "issue",
        str(authority),
        "gw2",
        "--rack",
        "FR/par1/a",
        "--roles",
        "gateway",
        "--address",
        "10.0.1.9:7400",
    )
    assert config.load(authority / "nodes" / "gw2" / "config.toml").rpc.listen == "10.0.1.9:7400"
    assert create.load_plan(authority).nodes[0].address == "10.0.1.9:7400"


def test_a_layout_that_cannot_hold_the_profile_is_refused_with_the_numbers(authority: Path) -> None:
    call(
        "cluster",
        "issue",
        str(authority),
        "n1",
        "--rack",
        "FR/par1/a",
        "--roles",
        "storage",
        "--address",
        "h:1",
        "--disk",
        "/d1",
    )
    with pytest.raises(OperatorError, match=r"4\+2 needs 6 disks"):
        call("cluster", "layout", str(authority))
    assert create.load_plan(authority).epoch == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("n1", "--rack", "Paris", "--roles", "storage", "--address", "h:1", "--disk", "/d"), "COUNTRY/SITE/RACK"),
        (("n1", "--rack", "US/nyc/a", "--roles", "storage", "--address", "h:1", "--disk", "/d"), "outside|not"),
        (("n1", "--rack", "FR/p/a", "--roles", "storage", "--address", "nowhere", "--disk", "/d"), "HOST:PORT"),
        (("n1", "--rack", "FR/p/a", "--roles", "storage", "--address", "h:1"), "at least one"),
        (("n1", "--rack", "FR/p/a", "--roles", "butler"), "not a choice"),
        (("N 1", "--rack", "FR/p/a", "--roles", "gateway"), "name"),
    ],
)
def test_a_node_that_could_not_run_gets_no_certificate(authority: Path, arguments: tuple[str, ...], word: str) -> None:
    with pytest.raises(OperatorError, match=word):
        call("cluster", "issue", str(authority), *arguments)
    assert create.load_plan(authority).nodes == []


def signed_in(place: Path, node: str) -> Layout:
    content = (place / "nodes" / node / "identity" / create.LAYOUT_NAME).read_bytes()
    return signed_layout.verify_layout(
        decode(content, signed_layout.SignedLayout), issuing.load_authority(place).administration.public_key(), "eu-1"
    )


def test_addresses_renewals_and_gateways_change_and_nothing_moves(authority: Path) -> None:
    issue_three(authority)
    call("cluster", "layout", str(authority))
    before = signed_in(authority, "n1")
    call(
        "cluster",
        "issue",
        str(authority),
        "n1",
        "--rack",
        "FR/par1/a",
        "--roles",
        "storage",
        "--address",
        "10.9.9.9:7400",
    )
    call("cluster", "issue", str(authority), "gateway2", "--rack", "FR/par2/b", "--roles", "gateway")
    call("node", "remove", str(authority), "gateway")
    call("cluster", "layout", str(authority))
    after = signed_in(authority, "gateway2")
    assert (after.epoch, after.node_by_name["n1"].address, "gateway" in after.node_by_name) == (
        2,
        "10.9.9.9:7400",
        False,
    )
    assert (after.seeds, after.disks) == (before.seeds, before.disks)
    with pytest.raises(OperatorError, match="no node of this cluster"):
        call("node", "remove", str(authority), "gateway")


def test_a_plan_put_back_from_a_backup_signs_no_epoch_twice_and_no_layout_blindly(authority: Path) -> None:
    issue_three(authority)
    backup = (authority / "cluster.json").read_bytes()
    for _ in range(2):
        call("cluster", "layout", str(authority))
    newest = (authority / "cluster.json").read_bytes()
    create.write_private(authority / "cluster.json", backup)
    call("cluster", "layout", str(authority))
    assert signed_in(authority, "n1").epoch == 3
    (authority / create.LAYOUT_NAME).unlink()
    call("cluster", "layout", str(authority))  # the nodes' folders have it too
    assert signed_in(authority, "n1").epoch == 4
    create.write_private(authority / "cluster.json", newest)
    for path in (authority / create.LAYOUT_NAME, *authority.glob(f"nodes/*/identity/{create.LAYOUT_NAME}")):
        path.unlink()
    with pytest.raises(OperatorError, match="layout 2 was signed, and is not here any more"):
        call("cluster", "layout", str(authority))


def test_the_seeds_are_an_odd_number_of_disks_in_distinct_domains() -> None:
    def layout(racks: int) -> Layout:
        nodes = tuple(NodeEntry(f"n{i}", f"FR/p/{i}", "h:1", ("storage",)) for i in range(racks))
        return Layout("c", 1, nodes, tuple(DiskEntry(f"{n.name}-{i}", n.name, 1) for n in nodes for i in range(2)), ())

    assert create.seeds_of(layout(3)) == ("n0-0", "n1-0", "n2-0")
    assert len(create.seeds_of(layout(4))) == 3
    assert len(create.seeds_of(layout(9))) == 5


def gateway_config(tmp_path: Path) -> Path:
    (tmp_path / "gw").mkdir()
    file = tmp_path / "gw" / "config.toml"
    node = create.NodePlan("gateway", "FR/par1/a", ("gateway",))
    file.write_text(
        create.gateway_config(
            node, ".", "127.0.0.1:8333", "eu-fr-1", {"keyring": "keys/keyring", "credential": "keys/credential"}
        )
    )
    return file


def test_keys_are_made_once_and_never_over_others(tmp_path: Path) -> None:
    file = gateway_config(tmp_path)
    call("keys", "create", str(file))
    before = (tmp_path / "gw/keys/keyring").read_bytes()
    with pytest.raises(FileExists):
        call("keys", "create", str(file))
    assert (tmp_path / "gw/keys/keyring").read_bytes() == before


def test_a_lost_keyring_comes_back_from_its_backup(tmp_path: Path) -> None:
    from storaged import keys
    from storaged.node.protection import protection_of

    file = gateway_config(tmp_path)
    call("keys", "create", str(file))
    loaded = config.load(file)
    material = open_keyring(Path(loaded.keys.keyring), protection_of(loaded))
    keys.backup(material, tmp_path / "backup", "correct horse", cost=keys.Argon2Cost(64, 1, 1))
    for name in ("keyring", "credential"):
        (tmp_path / "gw/keys" / name).unlink()
    (tmp_path / "wrong").write_text("battery staple\n")
    with pytest.raises(WrongPassphrase):
        call(
            "keys",
            "restore",
            str(tmp_path / "backup"),
            "--config",
            str(file),
            "--passphrase-file",
            str(tmp_path / "wrong"),
        )
    assert not (tmp_path / "gw/keys/keyring").exists()
    (tmp_path / "right").write_text("correct horse\n")
    call(
        "keys", "restore", str(tmp_path / "backup"), "--config", str(file), "--passphrase-file", str(tmp_path / "right")
    )
    assert open_keyring(Path(loaded.keys.keyring), protection_of(loaded)).keyring_id == material.keyring_id
    kept = (tmp_path / "gw/keys/keyring").read_bytes()
    call(
        "keys", "restore", str(tmp_path / "backup"), "--config", str(file), "--passphrase-file", str(tmp_path / "right")
    )
    assert (tmp_path / "gw/keys/keyring").read_bytes() == kept, "the backup's own keyring stays as it is"
    (tmp_path / "gw/keys/keyring").unlink()
    (tmp_path / "gw/keys/credential").unlink()
    call("keys", "create", str(file))
    another = (tmp_path / "gw/keys/keyring").read_bytes()
    with pytest.raises(OperatorError):
        call(
            "keys",
            "restore",
            str(tmp_path / "backup"),
            "--config",
            str(file),
            "--passphrase-file",
            str(tmp_path / "right"),
        )
    assert (tmp_path / "gw/keys/keyring").read_bytes() == another


def test_a_missing_credential_is_no_new_credential(tmp_path: Path) -> None:
    from storaged.node.protection import protection_of

    with pytest.raises(KeyringMismatch):
        protection_of(config.load(gateway_config(tmp_path)))


@pytest.mark.parametrize("directory", ["", "without"])
def test_a_keyring_is_not_made_under_a_credential_that_systemd_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    """The gateway that systemd starts could not open it. A command that has the credential makes the keyring."""
    file = gateway_config(tmp_path)
    file.write_text(file.read_text().replace("keys/credential", "$CREDENTIALS_DIRECTORY/keyring"))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / directory) if directory else "")
    restore = ("restore", str(backup_in(tmp_path)), "--config", str(file), *phrase(tmp_path))
    for arguments in (("create", str(file)), restore):
        with pytest.raises(OperatorError, match="CREDENTIALS_DIRECTORY"):
            call("keys", *arguments)
    assert sorted(path.name for path in (tmp_path / "gw").iterdir()) == ["config.toml"]
    assert not (tmp_path / "without").exists()
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "keyring").write_bytes(bytes(32))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "with"))
    call("keys", *restore)
    assert open_keyring(tmp_path / "gw/keys/keyring", Credential(bytes(32)))


def phrase(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "right").write_text("correct horse\n")
    return "--passphrase-file", str(tmp_path / "right")


def backup_in(tmp_path: Path) -> Path:
    """A backup of a keyring, made elsewhere."""
    material = create_keyring(tmp_path / "elsewhere", Credential(bytes(32)))
    backup(material, tmp_path / "backup", "correct horse", cost=Argon2Cost(64, 1, 1))
    return tmp_path / "backup"


# --- errors and help


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_an_error_is_a_message_a_hint_and_an_exit_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[node]\nnam = 1\n")
    code, _, shown = outcome(capsys, "config", "check", str(tmp_path / "bad.toml"))
    assert code == 1
    assert "line 2" in shown
    assert "did you mean 'name'?" in shown
    assert "storaged explain CONFIG_INVALID" in shown
    assert "Traceback" not in shown


def test_status_without_a_cluster_is_down(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, shown = outcome(capsys, "--dir", str(tmp_path), "status")
    assert code == 2
    assert "no cluster" in shown


def test_a_misspelt_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, shown = outcome(capsys, "statsu")
    assert code == 2
    assert "Did you mean status" in shown
    code, _, shown = outcome(capsys, "frobnicate")
    assert (code, "storaged --help" in shown) == (2, True)


def test_settings_of_a_server_are_refused_with_where_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").touch()
    code, _, shown = outcome(capsys, "--dir", str(tmp_path), "env")
    assert code == 2
    assert "storaged user add" in shown


def test_an_explanation_says_more_than_its_code() -> None:
    for kind in every_error():
        if not kind.__module__.startswith("storaged."):
            continue  # another test's
        words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", kind.code).lower().split()
        said = set(re.findall(r"[a-z']+", explained(kind.code).split("\n", 1)[1].lower()))
        assert len(said - set(words)) >= 2, f"{kind.code}: {explained(kind.code)}"


def test_codes_of_refused_calls_and_of_the_guide_can_be_explained() -> None:
    """Logs and audit logs have the former."""
    codes = {text for name, text in vars(faults).items() if name.isupper() and name == text}
    assert "ROLE_REFUSED" in codes
    guide = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", guide)) - {"OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert len(named) > 30
    for code in codes | named:
        assert explained(code)


@pytest.mark.parametrize("code", ["DISK_FOREIGN", "DISK_ROLLED_BACK", "DISK_BLANK"])
def test_every_explanation_of_a_lost_disk_says_to_replace_it(code: str) -> None:
    shown = explained(code)
    assert "replace" in shown.split("Otherwise")[-1].split("If the disk is gone")[-1]
    assert "leave" not in shown


def test_every_code_can_be_explained_and_a_misspelt_one_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "explain", "node-down")
    assert (code, out.splitlines()[0]) == (0, "NODE_DOWN")
    code, out, _ = outcome(capsys, "explain", "NoSuchKey")
    assert "HTTP 404" in out
    code, _, shown = outcome(capsys, "explain", "NODE_DWN")
    assert code == 1
    assert "NODE_DOWN" in shown
    code, _, shown = outcome(capsys, "explain", "qqqqqq")
    assert "`storaged explain` lists them" in shown
    code, out, _ = outcome(capsys, "explain")
    assert "KEYRING_MISMATCH" in out
