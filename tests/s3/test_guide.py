"""The chapters of deploy/README.md about changes are executed as they are written, on real processes.

A chapter's shell blocks are read from the guide, and its commands run one after the other, each on its machine. The
tables below say which machine that is, and what the text around the commands says to do by hand: to copy a file, to
start a node, to edit its configuration. Only names of folders and addresses are replaced (``Machine``), and the ticket
comes from a pipe. A command in these chapters that a table does not know fails
``test_all_commands_of_the_chapters_are_known``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos.objects import Objects
from tests.patience import GUARD_S
from tests.servers import DISKS, Servers

pytestmark = pytest.mark.timeout(3600)

GUIDE = Path(__file__).resolve().parents[2] / "deploy" / "README.md"
ADMIN, GATEWAY, NOWHERE = "the authority's machine", "gateway", ""


SMALL_PROFILE = "2+2"
"""Instead of the guide's 8+3: a test has six disks."""


LAYOUT = "layout.signed"
"""Instead of a name with a number."""


class Line(NamedTuple):
    """``begins``: the start of a command in the guide. ``machine``: where it runs; NOWHERE: it is not run here.
    ``then``: what the text says to do afterwards.
    """

    begins: str
    machine: str
    then: Callable[[Reader], None] | None = None


def commands_of(chapter: str) -> list[str]:
    """The commands of all shell blocks below the heading ``chapter``, up to the next one of its level."""
    text = GUIDE.read_text()
    found = re.search(rf"^(#+) {re.escape(chapter)}\n(.*?)(?=^#{{2,3}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"deploy/README.md has no chapter {chapter!r}"
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", found[2], re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.partition(" #")[0].split()) for line in lines if line.strip()]


class Reader:
    """Who reads the guide. ``printed``: the output of the last command. ``pending``: layouts that are to be applied."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.objects = Objects(servers.boto3, "demo", 60)
        self.ticket = ""
        self.leaked = servers.root / "leaked"
        self.printed = ""
        self.fingerprint = ""
        self.known = set(self.layouts())

    def layouts(self) -> list[Path]:
        found = (self.servers.authority / "layouts").glob("*.signed")
        return sorted(found, key=lambda path: int(path.stem.split("-")[1]))

    def follow(self, chapter: str, table: tuple[Line, ...]) -> None:
        for command, line in zip(commands_of(chapter), table, strict=True):
            assert command.startswith(line.begins)
            if line.machine != NOWHERE:
                self.run(self.localized(command, line.machine), line.machine)
            if line.then is not None:
                line.then(self)

    def run(self, command: str, machine: str) -> None:
        """In the folder that stands for the machine."""
        folder = self.servers.root if machine == ADMIN else self.servers.server(machine).folder
        environment = self.servers.environment()
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment,
            cwd=folder,
            input=self.ticket,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
        )
        assert done.returncode == 0, f"{command} on {machine}: {done.returncode}\n{done.stdout}{done.stderr}"
        self.printed = done.stdout

    def localized(self, command: str, machine: str) -> str:
        """Folders of servers and addresses replaced."""
        named = re.search(r"\b(n\d|gateway\d)\b", command)
        server = self.servers.server(named[1] if named else machine) if named or machine != ADMIN else None
        text = command.replace("8+3", SMALL_PROFILE)
        text = text.replace("FINGERPRINT", self.fingerprint)
        text = re.sub(r"layout-\d+\.signed", LAYOUT, text)
        if server is not None:
            text = re.sub(r"\b10(\.\d+){3}:7400\b", f"127.0.0.1:{server.port}", text)
            text = re.sub(r"/srv/disk(\d)", rf"{server.folder}/d\1", text)
            text = text.replace(f"/etc/storaged/{server.name}", str(server.folder / "etc"))
        text = text.replace("/var/lib/storaged/gateway", str(self.servers.servers[GATEWAY].state))
        assert not re.search("/(srv|etc/storaged|var/lib)/", text), f"{text}: it names no server"
        return text

    # --- what the text says to do by hand

    def keep_ticket(self) -> None:
        self.ticket = next(line for line in self.printed.splitlines() if line.startswith("storaged-ticket-"))

    def localize(self, name: str) -> None:
        """The configuration that came with a certificate names the directories of a server of its own."""
        server = self.servers.servers[name]
        text = server.config.read_text().replace(f"/var/lib/storaged/{name}", str(server.state))
        text = re.sub(r'\n\[admin\]\nlisten = "[^"]*"\n', "\n", text)
        server.config.write_text(text)
        self.servers.give_s3_port(name)

    def apply_layouts(self) -> None:
        """Those that were signed since the last time, one after the other; repeated while rows are copied."""
        files = [file for file in self.layouts() if file not in self.known]
        self.known.update(files)
        for file in files:
            self.servers.apply(file)

    def copy_layout(self) -> None:
        """The one that was signed last, whatever its number."""
        (file,) = (file for file in self.layouts() if file not in self.known)
        shutil.copy(file, self.servers.servers[GATEWAY].folder / LAYOUT)
        self.known.add(file)

    def exchange_ids(self, name: str) -> None:
        """As ``disk replace`` says."""
        found = re.search(r"disk (\w+) is in the list for (\w+)", self.printed)
        assert found, self.printed
        config = self.servers.servers[name].config
        config.write_text(config.read_text().replace(f'"{found[2]}"', f'"{found[1]}"'))

    def check(self) -> None:
        """Everything is where it should be, can be read, and the cluster says so."""
        self.servers.wait_moved()
        self.servers.wait_healthy()
        self.objects.compare()
        assert self.objects.wrong == []

    def nodes_with_fragments(self) -> set[str]:
        return {row["node"] for key in self.objects.coded for row in self.servers.where("demo", key)["fragments"]}


def copy_request(name: str) -> Callable[[Reader], None]:
    def copy(reader: Reader) -> None:
        shutil.copy(reader.servers.servers[name].folder / "etc" / "request", reader.servers.root / "request")

    return copy


def copy_answer(name: str) -> Callable[[Reader], None]:
    def copy(reader: Reader) -> None:
        shutil.copy(reader.servers.authority / "nodes" / name / "answer", reader.servers.servers[name].folder)

    return copy


def start_server(reader: Reader) -> None:
    reader.servers.begin("n4")
    reader.copy_layout()


def has_joined(reader: Reader) -> None:
    reader.check()
    assert "n4" in reader.nodes_with_fragments()


def start_gateway(reader: Reader) -> None:
    reader.localize("gateway2")
    reader.apply_layouts()
    reader.servers.give_keyring("gateway2")
    reader.servers.start_gateway("gateway2")
    reader.check()
    node = reader.servers.node("gateway2")
    assert node is not None
    assert node["state"] == "up"


def go_on(reader: Reader) -> None:
    assert "paused" in reader.printed, reader.printed
    for command in ("pace partitions none", "pace fragments none", "pace collection none", "resume partitions"):
        reader.run(reader.localized(f"storaged --dir /var/lib/storaged/gateway job {command}", GATEWAY), GATEWAY)


def take_back_twice(reader: Reader) -> None:
    """The server is needed afterwards: what takes it back is taken back, while partitions are under way."""
    reader.apply_layouts()
    reader.run("storaged cluster abort authority", ADMIN)
    reader.apply_layouts()
    has_joined(reader)


ADD_A_SERVER = (
    Line("storaged node invite authority n4 ", ADMIN, Reader.keep_ticket),
    Line("storaged node join - /etc/storaged/n4", "n4", copy_request("n4")),
    Line("storaged node sign authority request", ADMIN, copy_answer("n4")),
    Line("storaged cluster plan authority", ADMIN),
    Line("storaged cluster layout authority", ADMIN),
    Line("storaged node join - /etc/storaged/n4 answer", "n4", lambda reader: reader.localize("n4")),
    Line("chown -R storaged:storaged /etc/storaged/n4 ", NOWHERE),
    Line("storaged config check /etc/storaged/n4/config.toml", "n4", start_server),
    Line("storaged --dir /var/lib/storaged/gateway cluster apply ", GATEWAY, has_joined),
    Line("storaged job pace partitions 30", GATEWAY),
    Line("storaged job pace fragments 20MiB", GATEWAY),
    Line("storaged job pause partitions", GATEWAY),
    Line("storaged job pace collection 500", GATEWAY),
    Line("storaged job list", GATEWAY, go_on),
    Line("storaged cluster abort authority --dry-run", ADMIN),
    Line("storaged cluster abort authority", ADMIN, take_back_twice),
    Line("storaged gateway invite authority gateway2 ", ADMIN, Reader.keep_ticket),
    Line("storaged gateway join - /etc/storaged/gateway2", "gateway2", copy_request("gateway2")),
    Line("storaged node sign authority request", ADMIN, copy_answer("gateway2")),
    Line("storaged cluster layout authority", ADMIN),
    Line("storaged gateway join - /etc/storaged/gateway2 answer", "gateway2", start_gateway),
)
A_DISK_DIED = (
    Line("storaged disk replace authority n1 /srv/disk1", ADMIN, lambda reader: reader.exchange_ids("n1")),
    Line("storaged cluster plan authority", ADMIN),
    Line("storaged cluster layout authority", ADMIN),
)
A_SERVER_DIED = (
    Line("storaged node remove authority n1", ADMIN),
    Line("storaged cluster plan authority", ADMIN),
    Line("storaged cluster layout authority", ADMIN, Reader.apply_layouts),
    # The rest loses data, and is for a cluster that has lost a majority of some replicas: another one than this.
    Line("storaged --dir /var/lib/storaged/gateway cluster losses DISK1 DISK2", NOWHERE),
    Line("storaged --dir /var/lib/storaged/gateway cluster losses DISK1 DISK2 --json > LOSSES", NOWHERE),
    Line("storaged cluster recover authority --losses LOSSES", NOWHERE),
    Line("storaged cluster recover authority --losses LOSSES --unsafe", NOWHERE),
)


def keep_fingerprint(reader: Reader) -> None:
    """The older one of n1: the list is in the order of their making."""
    mine = [line for line in reader.printed.splitlines() if line.startswith("n1 ")]
    assert len(mine) == 2, reader.printed
    reader.fingerprint = mine[0].split()[-1]


CHANGE_THE_PROFILE = (
    Line("storaged cluster profile authority 8+3 --dry-run", ADMIN),
    Line("storaged cluster profile authority 8+3", ADMIN),
    Line("storaged cluster plan authority", ADMIN),
    Line("storaged cluster layout authority", ADMIN, Reader.apply_layouts),
)
RENEW = (
    Line("storaged cluster renew authority n1", ADMIN, Reader.keep_ticket),
    Line("storaged node join - /etc/storaged/n1", "n1", copy_request("n1")),
    Line("storaged node sign authority request", ADMIN, copy_answer("n1")),
    Line("storaged node join - /etc/storaged/n1 answer", "n1"),
)
A_CERTIFICATE_LEAKED = (
    Line("storaged cluster certificates authority", ADMIN, keep_fingerprint),
    Line("storaged cluster revoke authority FINGERPRINT", ADMIN),
    Line("storaged cluster layout authority", ADMIN, Reader.copy_layout),
    Line("storaged --dir /var/lib/storaged/gateway cluster apply ", GATEWAY),
)
A_RACK_MOVES = (
    Line("storaged rack rename authority FR/par1/a FR/par3/k", ADMIN),
    Line("storaged cluster layout authority", ADMIN, Reader.apply_layouts),
)
BY_ITSELF = (
    # For a cluster whose layout was signed by an older version: another one than this.
    Line("storaged --dir /var/lib/storaged/GATEWAY cluster fetch now.signed", NOWHERE),
    Line("storaged cluster adopt authority now.signed", NOWHERE),
    Line("storaged cluster layout authority", NOWHERE),
    Line("storaged cluster sparing authority --fragments 10m --registers 1h --domains 1", ADMIN),
    Line("storaged cluster layout authority", ADMIN, Reader.apply_layouts),
)
CHAPTERS = {
    "Add a server": ADD_A_SERVER,
    "A disk died": A_DISK_DIED,
    "A server died": A_SERVER_DIED,
    "Renew a certificate": RENEW,
    "A certificate leaked": A_CERTIFICATE_LEAKED,
    "A rack moves": A_RACK_MOVES,
    "What the cluster does by itself": BY_ITSELF,
    "Change the profile": CHANGE_THE_PROFILE,
}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_all_commands_of_the_chapters_are_known(chapter: str) -> None:
    commands, table = commands_of(chapter), CHAPTERS[chapter]
    assert [
        command for command, line in zip(commands, table, strict=False) if not command.startswith(line.begins)
    ] == []
    assert len(commands) == len(table), commands


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A cluster of three servers, with data. The tests follow each other."""
    servers = Servers(tmp_path_factory.mktemp("guide") / "servers")
    try:
        found = Reader(servers.create())
        found.objects.write()
        yield found
    finally:
        servers.stop()


def test_a_server_and_a_gateway_are_added_as_the_guide_says(reader: Reader) -> None:
    reader.follow("Add a server", ADD_A_SERVER)


def test_a_certificate_is_renewed_as_the_guide_says(reader: Reader) -> None:
    servers = reader.servers
    shutil.copytree(servers.servers["n1"].config.parent / "identity", reader.leaked)
    reader.follow("Renew a certificate", RENEW)
    servers.reload("n1")
    servers.wait_until(
        lambda: "this node presents a new certificate" in servers.log_of("n1", 50), 60, "the new certificate"
    )
    reader.check()


def test_a_certificate_that_leaked_is_revoked_as_the_guide_says(reader: Reader) -> None:
    """The test before has renewed it. A thief has the old one."""
    servers = reader.servers
    here, own = servers.servers["n1"].config.parent / "identity", servers.root / "own"
    reader.follow("A certificate leaked", A_CERTIFICATE_LEAKED)
    reader.check()
    servers.stop_node("n1")
    here.rename(own)
    shutil.copytree(reader.leaked, here)
    servers.begin("n1")
    servers.wait_until(lambda: says_revoked(servers, "n1"), 60, "CERTIFICATE_REVOKED of n1")
    servers.stop_node("n1")
    shutil.rmtree(here)
    own.rename(here)
    servers.start_node("n1")
    reader.check()


def test_a_rack_is_renamed_as_the_guide_says(reader: Reader) -> None:
    """It moves nothing."""
    places = reader.objects.places(reader.servers)
    reader.follow("A rack moves", A_RACK_MOVES)
    node = reader.servers.node("n1")
    assert node is not None
    assert node["rack"] == "FR/par3/k"
    reader.check()
    assert reader.objects.places(reader.servers) == places


def test_delays_of_sparing_are_set_as_the_guide_says(reader: Reader) -> None:
    reader.follow("What the cluster does by itself", BY_ITSELF)
    reader.check()


def test_a_dead_disk_is_replaced_as_the_guide_says(reader: Reader) -> None:
    servers = reader.servers
    servers.kill_node("n1")
    shutil.rmtree(servers.servers["n1"].folder / DISKS[0])
    (servers.servers["n1"].folder / DISKS[0]).mkdir(mode=0o700)
    servers.start_node("n1")
    servers.wait_until(lambda: has_problem(servers, "DISK_BLANK", "n1"), 60, "DISK_BLANK of n1")
    reader.objects.compare()
    reader.follow("A disk died", A_DISK_DIED)
    servers.begin_again("n1")
    reader.apply_layouts()
    reader.check()


def test_a_server_that_is_gone_for_good_is_removed_as_the_guide_says(reader: Reader) -> None:
    servers = reader.servers
    servers.kill_node("n1")
    servers.servers["n1"].folder.rename(servers.root / "gone")
    reader.objects.compare()
    reader.follow("A server died", A_SERVER_DIED)
    reader.check()
    assert servers.node("n1") is None
    assert reader.nodes_with_fragments() == {"n2", "n3", "n4"}


def test_the_profile_is_changed_as_the_guide_says(reader: Reader) -> None:
    reader.follow("Change the profile", CHANGE_THE_PROFILE)
    reader.check()
    rows = [row for key in reader.objects.coded for row in reader.servers.where("demo", key)["fragments"]]
    assert {row["profile"] for row in rows} == {SMALL_PROFILE}


def says_revoked(servers: Servers, node: str) -> bool:
    """In its log and in the status that the node itself gives."""
    found = json.loads(servers.on(node, "status", "--json", check=False).stdout)
    codes = {problem["code"] for problem in found.get("problems", ())}
    return "CERTIFICATE_REVOKED" in codes and "code=CERTIFICATE_REVOKED" in servers.log_of(node, 5000)


def has_problem(servers: Servers, code: str, node: str) -> bool:
    problems = servers.status()["problems"]
    return any(problem["code"] == code and node in problem["subject"] for problem in problems)
