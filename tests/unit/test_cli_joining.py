"""Servers join by a ticket: their keys stay where they were made, and each ticket signs one certificate."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from storaged import config
from storaged.cli import create, joining
from storaged.cluster import identity, tickets
from storaged.errors import (
    CertificateRefused,
    JoinRefused,
    JurisdictionRefused,
    LayoutUnsafe,
    OperatorError,
    TicketExpired,
    TicketForeign,
    TicketInvalid,
    TicketUsed,
)
from storaged.wire import decode, encode
from tests.worlds.authority_folder import SAID, answered, call, three_signed


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return three_signed(tmp_path / "authority")


def invite(capsys: SAID, place: Path, name: str = "n4", *more: str) -> str:
    where = ("--rack", "DE/fra/d", "--address", "10.0.4.1:7400", "--disk", "/srv/disk1")
    return str(answered(capsys, "node", "invite", str(place), name, *where, *more)["ticket"])


def state_of(place: Path) -> dict[str, bytes]:
    """All that is in a folder."""
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def ask(ticket: str, server: Path) -> Path:
    call("node", "join", ticket, str(server))
    return server / joining.REQUEST_NAME


def sign(capsys: SAID, place: Path, request: Path) -> Path:
    return Path(answered(capsys, "node", "sign", str(place), str(request))["answer"])


def test_a_server_joins_and_its_key_never_leaves_it(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    server = tmp_path / "n4"
    ticket = invite(capsys, authority)
    request = ask(ticket, server)
    key = (server / "identity" / joining.PENDING_KEY).read_bytes()
    assert (server / "identity" / joining.PENDING_KEY).stat().st_mode & 0o777 == 0o600
    answer = sign(capsys, authority, request)
    done = answered(capsys, "node", "join", ticket, str(server), str(answer))
    assert done == {"node": "n4", "kind": "join", "config": str(server / "config.toml"), "layout": True}
    own = identity.load_identity(server / "identity")
    assert (own.name, own.cluster, str(own.peer.rack), own.peer.roles) == ("n4", "eu-1", "d", ("storage",))
    loaded = config.load(server / "config.toml")
    assert (loaded.rpc.listen, [disk.directory for disk in loaded.disks]) == ("10.0.4.1:7400", ["/srv/disk1"])
    assert (server / "identity" / "node.key").read_bytes() == key
    assert not request.exists()
    assert not any(key in content for content in state_of(authority).values())
    call("cluster", "layout", str(authority))
    layout = create.read_layout(create.issuing.load_authority(authority), authority / "layout.signed")[1]
    assert [disk.id for disk in layout.disks if disk.node == "n4"] == [disk.id for disk in loaded.disks]
    assert "copy" not in [line.split()[0] for line in capsys.readouterr().out.splitlines() if "n4" in line]


def test_a_server_that_joins_a_cluster_in_use_gets_the_layout_that_placed_everything(
    authority: Path, tmp_path: Path, capsys: SAID
) -> None:
    call("node", "sign", str(authority), str(ask(invite(capsys, authority), tmp_path / "n4")))
    call("cluster", "layout", str(authority))
    ticket = invite(capsys, authority, "n5", "--rack", "DE/ber/e")
    answer = sign(capsys, authority, ask(ticket, tmp_path / "n5"))
    call("node", "join", ticket, str(tmp_path / "n5"), str(answer))
    for name, epoch in ((create.LAYOUT_NAME, 100), (create.BASE_NAME, 1)):
        found = (tmp_path / "n5" / "identity" / name).read_bytes()
        assert found == (authority / "layouts" / f"layout-{epoch}.signed").read_bytes()


def test_a_gateway_joins_with_an_address(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    where = ("--rack", "FR/par2/b", "--address", "10.0.2.9:7400")
    ticket = answered(capsys, "gateway", "invite", str(authority), "gw2", *where)["ticket"]
    answer = sign(capsys, authority, ask(ticket, tmp_path / "gw2"))
    call("gateway", "join", ticket, str(tmp_path / "gw2"), str(answer))
    loaded = config.load(tmp_path / "gw2" / "config.toml")
    assert (loaded.gateway, loaded.rpc.listen) == (True, "10.0.2.9:7400")
    call("cluster", "layout", str(authority))
    layout = create.read_layout(create.issuing.load_authority(authority), authority / "layout.signed")[1]
    assert layout.node_by_name["gw2"].address == "10.0.2.9:7400"


def test_a_member_gets_a_new_certificate_for_a_key_that_it_makes(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    server = tmp_path / "n1"
    (authority / "nodes" / "n1").rename(server)
    before, listed = state_of(server), create.load_plan(authority)
    ticket = answered(capsys, "cluster", "renew", str(authority), "n1")["ticket"]
    request = ask(ticket, server)
    assert identity.load_identity(server / "identity").name == "n1", "it runs with the old one meanwhile"
    answer = sign(capsys, authority, request)
    call("node", "join", ticket, str(server), str(answer))
    after = state_of(server)
    changed = {Path(name).name for name in after if after[name] != before.get(name)}
    assert changed == {"node.key", "node.crt"}
    assert before.keys() == after.keys()
    assert identity.load_identity(server / "identity").name == "n1"
    assert create.load_plan(authority) == listed
    with pytest.raises(TicketUsed):
        call("node", "sign", str(authority), str(ask(ticket, server)))
    with pytest.raises(OperatorError, match="n9 is no node"):
        call("cluster", "renew", str(authority), "n9")


def test_a_member_changes_no_authority_for_a_ticket(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    """Who has read a ticket, and stands between both machines, could otherwise make a member believe false layouts."""
    server = tmp_path / "n1"
    (authority / "nodes" / "n1").rename(server)
    ticket = tickets.read_ticket(answered(capsys, "cluster", "renew", str(authority), "n1")["ticket"])
    before = state_of(server)
    for forged in (replace(ticket, administration=bytes(32)), replace(ticket, authority=bytes(32))):
        with pytest.raises(TicketForeign, match="another authority"):
            ask(tickets.write_ticket(forged), server)
    assert state_of(server) == before


def test_a_request_for_a_key_on_a_curve_that_nobody_knows_is_refused_by_name(
    authority: Path, tmp_path: Path, capsys: SAID
) -> None:
    ticket = tickets.read_ticket(invite(capsys, authority))
    request = decode(tickets.make_request(ticket, ec.generate_private_key(ec.SECP256R1())), tickets.JoinRequest)
    curve = bytes.fromhex("06082a8648ce3d030107")
    assert request.csr.count(curve) == 1
    forged = replace(request, csr=request.csr.replace(curve, curve[:-1] + b"\x06"), mac=b"")
    forged = replace(forged, mac=tickets._mac(ticket, tickets._REQUEST_LABEL, forged))
    with pytest.raises(JoinRefused, match="can't be read"):
        tickets.check_request(ticket, forged)


def test_a_ticket_comes_from_a_pipe_or_a_terminal(
    authority: Path, tmp_path: Path, capsys: SAID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in no list of processes."""
    ticket = invite(capsys, authority)
    monkeypatch.setattr("sys.stdin", io.StringIO(ticket + "\n"))
    assert ask("-", tmp_path / "piped").exists()
    asked: list[bool] = []

    def prompt(_text: str, *, hide_input: bool) -> str:
        asked.append(hide_input)
        return ticket

    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("click.prompt", prompt)
    assert ask("-", tmp_path / "typed").exists()
    assert asked == [True]


def test_a_ticket_is_used_once(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    ticket = invite(capsys, authority)
    request = ask(ticket, tmp_path / "n4")
    sign(capsys, authority, request)
    other = ask(ticket, tmp_path / "another server")
    before = state_of(authority)
    for again in (request, other):
        with pytest.raises(TicketUsed):
            call("node", "sign", str(authority), str(again))
    assert state_of(authority) == before


def test_a_ticket_is_used_before_its_certificate_is_written(
    authority: Path, tmp_path: Path, capsys: SAID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in between: the node is invited again, and the first ticket signs nothing more."""
    request = ask(invite(capsys, authority), tmp_path / "n4")

    def dies(*_arguments: object) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(create, "keep_certificate", dies)
        with pytest.raises(OSError):
            call("node", "sign", str(authority), str(request))
    assert not (authority / "nodes" / "n4").exists()
    with pytest.raises(TicketUsed):
        call("node", "sign", str(authority), str(request))
    sign(capsys, authority, ask(invite(capsys, authority), tmp_path / "n4 again"))


def test_a_ticket_that_is_late_signs_nothing(
    authority: Path, tmp_path: Path, capsys: SAID, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = invite(capsys, authority)
    request = ask(ticket, tmp_path / "n4")
    now, before = joining.time.time(), state_of(authority)
    monkeypatch.setattr(joining.time, "time", lambda: now + 15 * 60)
    with pytest.raises(TicketExpired, match="by the clock of this machine"):
        call("node", "sign", str(authority), str(request))
    with pytest.raises(TicketExpired, match="by the clock of this server"):
        call("node", "join", ticket, str(tmp_path / "late"))
    assert state_of(authority) == before
    assert not (tmp_path / "late").exists()
    longer = invite(capsys, authority, "n4", "--valid", "2h")
    monkeypatch.setattr(joining.time, "time", lambda: now + 60 * 60)
    sign(capsys, authority, ask(longer, tmp_path / "n4 again"))


def with_mac(ticket: tickets.Ticket, request: tickets.JoinRequest) -> bytes:
    return encode(replace(request, mac=tickets._mac(ticket, tickets._REQUEST_LABEL, replace(request, mac=b""))))


def test_a_request_that_is_not_the_invited_nodes_is_refused(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    text = invite(capsys, authority)
    ticket, server = tickets.read_ticket(text), tmp_path / "n4"
    good = decode(ask(text, server).read_bytes(), tickets.JoinRequest)
    key = ec.generate_private_key(ec.SECP256R1())
    foreign = decode(tickets.make_request(replace(ticket, secret=bytes(32)), key), tickets.JoinRequest)
    gateway = decode(tickets.make_request(replace(ticket, roles=("gateway",)), key), tickets.JoinRequest)
    named = decode(tickets.make_request(replace(ticket, name="n5"), key), tickets.JoinRequest)
    weak = decode(tickets.make_request(ticket, ec.generate_private_key(ec.SECP384R1())), tickets.JoinRequest)
    torn = good.csr[:-1] + bytes([good.csr[-1] ^ 1])
    before = state_of(authority)
    for bad, error, said in (
        (encode(replace(good, csr=foreign.csr)), JoinRefused, "not made with the ticket's secret"),
        (encode(foreign), JoinRefused, "not made with the ticket's secret"),
        (encode(replace(good, mac=b"")), JoinRefused, "not made with the ticket's secret"),
        (encode(gateway), TicketInvalid, "an altered ticket"),
        (with_mac(ticket, replace(named, ticket_hash=ticket.hash)), JoinRefused, "is for n4; the request is from 'n5'"),
        (with_mac(ticket, replace(good, csr=named.csr)), JoinRefused, r"names \['n5'\]"),
        (with_mac(ticket, replace(good, csr=weak.csr)), JoinRefused, "ECDSA on P-256"),
        (with_mac(ticket, replace(good, csr=torn)), JoinRefused, "not signed by its own key"),
        (with_mac(ticket, replace(good, csr=b"x")), JoinRefused, "can't be read"),
        (encode(replace(good, cluster="eu-2")), TicketForeign, "is for cluster 'eu-2'"),
        (encode(replace(good, ticket=bytes(16))), TicketForeign, "not made with the folder"),
        (encode(replace(good, ticket=b"../../x")), TicketForeign, "not made with the folder"),
        (encode(replace(good, version=2)), JoinRefused, "has version 2"),
        (b"", JoinRefused, "no request"),
    ):
        file = tmp_path / "request"
        file.write_bytes(bad)
        with pytest.raises(error, match=said):
            call("node", "sign", str(authority), str(file))
    assert state_of(authority) == before
    file.write_bytes(encode(good))
    sign(capsys, authority, file)


def test_the_ticket_of_another_cluster_or_authority_signs_nothing(
    authority: Path, tmp_path: Path, capsys: SAID
) -> None:
    ticket = invite(capsys, authority)
    request = ask(ticket, tmp_path / "n4")
    for name in ("eu-2", "eu-1"):
        other = tmp_path / f"other-{name}"
        call("cluster", "create", str(other), "--cluster", name)
        before = state_of(other)
        with pytest.raises(TicketForeign):
            call("node", "sign", str(other), str(request))
        assert state_of(other) == before


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda text: "",
        lambda text: "hello",
        lambda text: text[:-3],
        lambda text: text[:40] + ("A" if text[40] != "A" else "B") + text[41:],
        lambda text: text.removeprefix(tickets.PREFIX),
        lambda text: text + "é",
        lambda text: tickets.write_ticket(replace(tickets.read_ticket(text), version=2)),
        lambda text: tickets.write_ticket(replace(tickets.read_ticket(text), kind="own")),
        lambda text: tickets.write_ticket(replace(tickets.read_ticket(text), secret=b"")),
    ],
)
def test_a_ticket_that_was_altered_is_named_on_the_server(
    authority: Path, tmp_path: Path, capsys: SAID, spoiled: Any
) -> None:
    text = invite(capsys, authority)
    with pytest.raises(TicketInvalid):
        call("node", "join", spoiled(text), str(tmp_path / "n4"))
    assert not (tmp_path / "n4").exists()


def test_an_answer_that_is_not_for_this_node_changes_nothing(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    server = tmp_path / "n4"
    text = invite(capsys, authority)
    ticket = tickets.read_ticket(text)
    answer = sign(capsys, authority, ask(text, server)).read_bytes()
    decoded = decode(answer, tickets.JoinAnswer)
    other_text = invite(capsys, authority, "n5", "--rack", "DE/ber/e")
    other = decode(sign(capsys, authority, ask(other_text, tmp_path / "n5")).read_bytes(), tickets.JoinAnswer)
    before = state_of(server)
    for bad, error, said in (
        (encode(other), JoinRefused, "belongs to another ticket"),
        (encode(replace(decoded, config="[node]")), JoinRefused, "not made with the ticket's secret"),
        (encode(replace(decoded, version=2)), JoinRefused, "not made with the ticket's secret"),
        (tickets.make_answer(ticket, replace(decoded, authority=b"x")), TicketForeign, "another authority"),
        (tickets.make_answer(ticket, replace(decoded, certificate=b"x")), JoinRefused, "does not hold"),
        (
            tickets.make_answer(ticket, replace(decoded, certificate=other.certificate)),
            JoinRefused,
            "certificate of 'n5'",
        ),
        (b"\xc1", JoinRefused, "no answer"),
    ):
        file = tmp_path / "answer"
        file.write_bytes(bad)
        with pytest.raises(error, match=said):
            call("node", "join", text, str(server), str(file))
    file.write_bytes(answer)
    with pytest.raises(JoinRefused, match="run this command without ANSWER first"):
        call("node", "join", text, str(tmp_path / "elsewhere"), str(file))
    call("node", "join", text, str(tmp_path / "n4 too"))
    with pytest.raises(JoinRefused, match="certifies another key"):
        call("node", "join", text, str(tmp_path / "n4 too"), str(file))
    assert state_of(server) == before
    call("node", "join", text, str(server), str(file))
    with pytest.raises(JoinRefused, match="has its certificate already"):
        call("node", "join", text, str(server))
    with pytest.raises(JoinRefused, match="is the identity of n4"):
        call("node", "join", other_text, str(server))


def test_a_server_that_stopped_in_the_middle_of_joining_ends_it_when_it_is_repeated(
    authority: Path, tmp_path: Path, capsys: SAID, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "n4"
    text = invite(capsys, authority)
    request = ask(text, server).read_bytes()
    assert ask(text, server).exists(), "the request can be made again"
    answer = sign(capsys, authority, server / joining.REQUEST_NAME)
    writes, write = 0, joining._write
    for crash in range(8):
        writes = 0

        def dies(path: Path, content: bytes, mode: int = 0o600, crash: int = crash) -> None:
            nonlocal writes
            if writes == crash:
                raise OSError
            writes += 1
            write(path, content, mode)

        with monkeypatch.context() as patch:
            patch.setattr(joining, "_write", dies)
            try:
                call("node", "join", text, str(server), str(answer))
            except OSError:
                continue
            break
    assert crash > 4
    assert request
    assert identity.load_identity(server / "identity").name == "n4"
    assert not (server / "config.issued.toml").exists()


def test_a_certificate_for_what_is_not_invited_is_not_offered(authority: Path, capsys: SAID) -> None:
    before = state_of(authority)
    base = ("--rack", "DE/fra/d", "--address", "10.0.4.1:7400")
    for command, error, said in (
        (("node", "invite", str(authority), "n1", *base), OperatorError, "n1 is a member already"),
        (("node", "invite", str(authority), "N 1", *base), OperatorError, "a node's name"),
        (("node", "invite", str(authority), "n4", *base, "--roles", "gateway"), OperatorError, "gateway invite"),
        (
            ("node", "invite", str(authority), "n4", *base, "--roles", "storage,chief"),
            OperatorError,
            "'chief' is not a choice",
        ),
        (
            ("node", "invite", str(authority), "n4", *base, "--disk", "/d", "--valid", "forever"),
            OperatorError,
            "--valid",
        ),
        (("node", "invite", str(authority), "n4", *base, "--disk", "/d", "--valid", "60d"), OperatorError, "--valid"),
        (("node", "invite", str(authority), "n4", *base, "--disk", "/d", "--valid", "0s"), OperatorError, "--valid"),
        (
            ("node", "invite", str(authority), "n4", "--rack", "US/nyc/a", "--address", "h:1", "--disk", "/d"),
            JurisdictionRefused,
            "US",
        ),
        (
            ("node", "invite", str(authority), "n4", "--rack", "DE/x", "--address", "h:1", "--disk", "/d"),
            OperatorError,
            "DE/x",
        ),
        (("gateway", "invite", str(authority), "gw2", "--rack", "DE/f/d", "--address", "h"), OperatorError, "address"),
    ):
        with pytest.raises(error, match=said):
            call(*command)
    assert state_of(authority) == before


def test_errors_of_joining_are_explained() -> None:
    from storaged.cli.operate import explained

    for error in (TicketInvalid, TicketExpired, TicketUsed, TicketForeign, JoinRefused, LayoutUnsafe):
        assert explained(error.code)
    assert issubclass(CertificateRefused, OperatorError)


# --- nodes that drain, go, or come back with empty disks


def states_of(place: Path, name: str) -> list[str]:
    return [disk.state for node in create.load_plan(place).nodes if node.name == name for disk in node.disks]


def join_n4(capsys: SAID, authority: Path, tmp_path: Path) -> None:
    sign(capsys, authority, ask(invite(capsys, authority), tmp_path / "n4"))


def test_a_node_drains_and_takes_part_again(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    join_n4(capsys, authority, tmp_path)
    done = answered(capsys, "node", "drain", str(authority), "n3")
    assert (done["node"], len(done["disks"]), done["state"]) == ("n3", 2, "draining")
    assert states_of(authority, "n3") == ["draining", "draining"]
    with pytest.raises(OperatorError, match="n3 has no disk that is not draining already"):
        call("node", "drain", str(authority), "n3")
    call("disk", "undrain", str(authority), "n3", "/srv/disk2")
    assert states_of(authority, "n3") == ["draining", "active"]
    with pytest.raises(OperatorError, match="is active already"):
        call("disk", "undrain", str(authority), "n3", "/srv/disk2")
    call("node", "undrain", str(authority), "n3")
    assert states_of(authority, "n3") == ["active", "active"]


def test_drains_that_would_break_redundancy_are_refused_by_name(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    before = state_of(authority)
    with pytest.raises(LayoutUnsafe, match="each rack with another disk has a seed"):
        call("node", "drain", str(authority), "n3")
    assert state_of(authority) == before
    join_n4(capsys, authority, tmp_path)
    call("node", "drain", str(authority), "n3")
    for layout in (False, True):
        if layout:
            call("cluster", "layout", str(authority))
        before = state_of(authority)
        for command in ("drain", "remove"):
            with pytest.raises(LayoutUnsafe):
                call("node", command, str(authority), "n2")
        assert state_of(authority) == before


def test_a_node_that_was_built_again_gets_disks_with_new_ids(authority: Path, capsys: SAID) -> None:
    old = next(node for node in create.load_plan(authority).nodes if node.name == "n2").disks
    done = answered(capsys, "node", "replace", str(authority), "n2")
    new = next(node for node in create.load_plan(authority).nodes if node.name == "n2").disks
    assert [(disk.directory, disk.weight) for disk in new] == [(disk.directory, disk.weight) for disk in old]
    assert [each["replaces"] for each in done["disks"]] == [disk.id for disk in old]
    assert [each["disk"] for each in done["disks"]] == [disk.id for disk in new]
    assert not {disk.id for disk in old} & {disk.id for disk in new}


def test_the_address_of_a_node_or_gateway_changes_and_nothing_moves(authority: Path, capsys: SAID) -> None:
    for name in ("n1", "gateway"):
        answered(capsys, "node", "address", str(authority), name, "10.9.9.9:7400")
    planned = answered(capsys, "cluster", "plan", str(authority))
    assert (planned["moves_data"], len(planned["changes"])) == (False, 2)
    before = state_of(authority)
    with pytest.raises(OperatorError, match="HOST:PORT"):
        call("node", "address", str(authority), "n1", "nowhere")
    assert state_of(authority) == before


@pytest.mark.parametrize("command", ["drain", "undrain", "remove", "replace"])
def test_a_command_about_a_node_that_is_not_there_changes_nothing(authority: Path, command: str) -> None:
    before = state_of(authority)
    with pytest.raises(OperatorError, match="n9 is no node"):
        call("node", command, str(authority), "n9")
    assert state_of(authority) == before
