"""The files of a cluster: its authority, each node's folder (certificate and configuration), the signed layout.

``cluster.json`` in the authority's directory lists the nodes that the next layout is made from. ``layout.signed``
beside it is the newest signed layout, and ``layouts/`` has all that were signed here. ``storaged cluster`` writes them,
and ``storaged dev`` for its own cluster. A node's folder has all that the node needs to start, and is copied to its
server as it is. ``cli.succeeding`` makes the layouts that follow a first one.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from storaged.cli.folder_lock import lock_folder
from storaged.cluster import issuing, signed_layout, tickets
from storaged.cluster.layout import (
    DiskEntry,
    Layout,
    Location,
    NodeEntry,
    Profile,
    RevokedCertificate,
    Sparing,
    problems_of,
)
from storaged.cluster.policy import Policy
from storaged.cluster.ports import PeerIdentity
from storaged.cluster.presigned import presign
from storaged.cluster.spread import minority_of
from storaged.durable import replace_file
from storaged.errors import LayoutRefused, LayoutUnsafe, OperatorError
from storaged.ids import new_disk_id
from storaged.objects.code.geometry import FRAGMENTS_MAX
from storaged.wire import decode, encode

REGISTER_NAME = "cluster.json"
LAYOUT_NAME = "layout.signed"
BASE_NAME = "base.signed"
"""Beside it: the layout that placed the keys that never moved. A new node follows the history of layouts from there."""
SEEDS_MAX = 5


class DiskPlan(msgspec.Struct):
    """A disk of a node. ``directory`` is as in the node's configuration; ``weight`` is relative (GB is a good unit).
    ``state`` and ``rank``: as in ``DiskEntry``.
    """

    id: str
    directory: str
    weight: int = 1000
    state: str = "active"
    rank: str = ""

    def replaces(self, old: DiskPlan) -> None:
        """Gives it what makes it hold what the other disk held."""
        self.weight, self.rank = old.weight, old.rank or old.id


class NodePlan(msgspec.Struct):
    """A node of the next layout. ``address`` is the HOST:PORT where other nodes call it, empty for a gateway.

    ``certified``: as in ``NodeEntry``.
    """

    name: str
    location: str
    roles: tuple[str, ...]
    address: str = ""
    jurisdiction: str = ""
    disks: list[DiskPlan] = []
    certified: str = ""


class RevokedPlan(msgspec.Struct):
    """A certificate that the next layout revokes. ``fingerprint`` is hex; ``node`` is empty when it is not known."""

    fingerprint: str
    node: str
    until_ms: int


class ClusterPlan(msgspec.Struct):
    """The nodes of the next layout. ``epoch`` is that of the newest layout here, 0 when there is none.

    ``signed`` is the highest epoch that was ever signed here, also of a layout that was overtaken: two layouts never
    get one epoch. ``before``: the epoch of the layout from which the last signed change went out; 0 when unknown.
    """

    cluster: str
    profile: str = "4+2"
    epoch: int = 0
    nodes: list[NodePlan] = []
    countries: tuple[str, ...] = ()
    jurisdictions: tuple[str, ...] = ()
    signed: int = 0
    before: int = 0
    revoked: list[RevokedPlan] = []
    sparing: tuple[int, int, int] = (600, 3600, 1)
    """As ``cluster.layout.Sparing``."""
    operators: dict[str, str] = {}
    """Rack -> who operates it."""
    spread: str = ""
    """As in ``Layout``."""

    @property
    def policy(self) -> Policy:
        """The cluster's policy. Raises JurisdictionRefused for a country outside EU law."""
        return Policy.of(self.countries, self.jurisdictions)

    def take_ranks(self, layout: Layout) -> None:
        """Notes the ranks that new disks got in a layout that was signed. A disk that it does not know keeps its rank
        unless another disk of the list has that now.
        """
        disks = [disk for node in self.nodes for disk in node.disks]
        known = {disk.id: layout.disk_by_id[disk.id].rank for disk in disks if disk.id in layout.disk_by_id}
        taken = {rank or disk for disk, rank in known.items()}
        for disk in disks:
            disk.rank = known.get(disk.id, "" if disk.rank in taken else disk.rank)

    def admit(self, node: NodePlan) -> None:
        """Raises JurisdictionRefused, with the reason, for a node that this cluster does not admit."""
        self.policy.admit(peer_of(self, node))


class TicketRecord(msgspec.Struct):
    """``tickets/ID.ticket``: a ticket that was made here, what its node will be, and the node's configuration."""

    ticket: str
    node: NodePlan
    config: str = ""


def peer_of(plan: ClusterPlan, node: NodePlan) -> PeerIdentity:
    """What the certificate of a node says."""
    place = Location.parse(node.certified or node.location)
    roles = tuple(sorted(node.roles))
    return PeerIdentity(
        node.name, place.country, place.site, place.rack, roles, node.jurisdiction or place.country, plan.cluster
    )


def load_plan(authority_directory: Path) -> ClusterPlan:
    """The list, which no other command changes until the running one ends (``cli.folder_lock``).

    Raises OperatorError when the directory is not one that ``storaged cluster create`` made, FolderInUse.
    """
    lock_folder(authority_directory)
    try:
        return msgspec.json.decode((authority_directory / REGISTER_NAME).read_bytes(), type=ClusterPlan)
    except FileNotFoundError:
        raise OperatorError(
            f"{authority_directory} holds no cluster; make one with: storaged cluster create {authority_directory}"
        ) from None
    except msgspec.MsgspecError as error:
        raise OperatorError(f"{authority_directory / REGISTER_NAME} cannot be read: {error}") from None


def save_plan(authority_directory: Path, plan: ClusterPlan) -> None:
    write_private(authority_directory / REGISTER_NAME, msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")


def parse_profile(text: str) -> str:
    """``4+2``, checked, without leading zeros. Raises OperatorError."""
    try:
        found = Profile.parse(text)
    except ValueError:
        raise OperatorError(f"{text!r} is not a profile such as 4+2") from None
    if found.k < 1 or found.m < 1:
        raise OperatorError(f"{text!r}: a profile has at least one data and one parity fragment")
    if found.n > FRAGMENTS_MAX:
        raise OperatorError(f"{text!r}: a block has at most {FRAGMENTS_MAX} fragments")
    return str(found)


def parse_countries(text: str) -> tuple[str, ...]:
    """The country codes of ``FR,DE``, sorted, each once. Raises JurisdictionRefused for a country outside EU law."""
    found = tuple(sorted({code.strip() for code in text.split(",") if code.strip()}))
    Policy.of(found)
    return found


def parse_location(text: str) -> str:
    """``FR/par1/a``, checked. Raises OperatorError."""
    try:
        return str(Location.parse(text))
    except ValueError:
        raise OperatorError(f"{text!r} is not COUNTRY/SITE/RACK, such as FR/par1/a") from None


def new_disks(directories: list[str]) -> list[DiskPlan]:
    """The disks of ``DIRECTORY`` or ``DIRECTORY:WEIGHT`` each, with random ids. Raises OperatorError."""
    found = []
    for text in directories:
        directory, colon, weight = text.rpartition(":")
        if colon and weight.isdigit() and int(weight) > 0:
            found.append(DiskPlan(new_disk_id(), directory, int(weight)))
        else:
            found.append(DiskPlan(new_disk_id(), text))
        if not found[-1].directory:
            raise OperatorError(f"{text!r} names no directory of a disk")
    return found


def issue_node(
    authority: issuing.Authority, node: NodePlan, folder: Path, config_text: str | None, *, member: bool = False
) -> None:
    """Writes certificate and configuration of one node into ``folder``.

    ``member``: its server has a configuration already, perhaps an edited one, and a copy of the folder must not
    replace it. So ``config_text`` goes into config.issued.toml.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    issuing.issue(
        authority,
        folder / "identity",
        name=node.name,
        location=node.certified or node.location,
        roles=node.roles,
        jurisdiction=node.jurisdiction,
    )
    keep_certificate(authority, x509.load_pem_x509_certificate((folder / "identity" / "node.crt").read_bytes()))
    if member:
        (folder / "config.toml").unlink(missing_ok=True)
    if config_text is not None:
        write_private(folder / ("config.issued.toml" if member else "config.toml"), config_text.encode())


def keep_certificate(authority: issuing.Authority, certificate: x509.Certificate) -> None:
    """Keeps a certificate that was signed here, under its fingerprint, so that it can be revoked."""
    name = certificate.fingerprint(hashes.SHA256()).hex()
    content = certificate.public_bytes(serialization.Encoding.PEM)
    write_private(authority.directory / "issued" / f"{name}.crt", content)


def answer_for(
    authority: issuing.Authority,
    ticket: bytes,
    certificate: x509.Certificate,
    config: str,
    last: tuple[signed_layout.SignedLayout, Layout] | None,
) -> tickets.JoinAnswer:
    """The answer to a request. ``last``: the newest signed layout, from which the node finds the others."""
    base = _base_of(authority, last[1]) if last is not None else None
    return tickets.JoinAnswer(
        tickets.VERSION,
        ticket,
        certificate.public_bytes(serialization.Encoding.DER),
        authority.certificate.public_bytes(serialization.Encoding.DER),
        config,
        encode(last[0]) if last is not None else b"",
        base or b"",
    )


def last_signed(authority: issuing.Authority, plan: ClusterPlan) -> tuple[signed_layout.SignedLayout, Layout] | None:
    """The newest layout that was signed here, or adopted; None when there is none.

    It lies beside the authority's keys; earlier versions left it in the nodes' folders only. A plan that was restored
    from a backup may be older. Raises OperatorError when ``plan`` knows of a newer layout than there is.
    """
    newest: tuple[signed_layout.SignedLayout, Layout] | None = None
    for path in (
        authority.directory / LAYOUT_NAME,
        *sorted(authority.directory.glob(f"nodes/*/identity/{LAYOUT_NAME}")),
    ):
        try:
            found = read_layout(authority, path)
        except FileNotFoundError:
            continue
        if newest is None or found[1].epoch > newest[1].epoch:
            newest = found
    if plan.epoch > (newest[1].epoch if newest is not None else 0):
        raise OperatorError(
            f"layout {plan.epoch} was signed, and is not here any more, so that nothing can be compared with it. "
            f"Copy {LAYOUT_NAME} from a node (it lies beside its certificate) to {authority.directory / LAYOUT_NAME}."
        )
    return newest


def read_layout(authority: issuing.Authority, path: Path) -> tuple[signed_layout.SignedLayout, Layout]:
    """Raises OperatorError for a file that is no layout of this cluster, FileNotFoundError."""
    try:
        signed = decode(path.read_bytes(), signed_layout.SignedLayout)
        return signed, signed_layout.verify_layout(signed, authority.administration.public_key(), authority.cluster)
    except (msgspec.MsgspecError, LayoutRefused) as error:
        raise OperatorError(f"{path} is no layout of this cluster: {error}. Move it away.") from None


def planned(plan: ClusterPlan, epoch: int) -> Layout:
    """The layout of all nodes in the plan, without seeds. Raises JurisdictionRefused for a node that its policy does
    not admit.
    """
    for node in plan.nodes:
        plan.admit(node)
    nodes = tuple(
        NodeEntry(node.name, node.location, node.address, tuple(node.roles), node.certified) for node in plan.nodes
    )
    disks = tuple(
        DiskEntry(disk.id, node.name, disk.weight, disk.state, disk.rank) for node in plan.nodes for disk in node.disks
    )
    revoked = tuple(RevokedCertificate(bytes.fromhex(one.fingerprint), one.node, one.until_ms) for one in plan.revoked)
    return Layout(
        plan.cluster,
        epoch,
        nodes,
        disks,
        (),
        plan.profile,
        countries=plan.countries,
        jurisdictions=plan.jurisdictions,
        revoked=revoked,
        sparing=Sparing(*plan.sparing),
        operators=tuple(sorted(plan.operators.items())),
        spread=plan.spread,
    )


def layout_of(plan: ClusterPlan) -> Layout:
    """The first layout of a cluster, of all nodes in the plan.

    Raises LayoutUnsafe with every reason why it cannot work, JurisdictionRefused for a node that its policy does not
    admit.
    """
    bare = planned(plan, plan.epoch + 1)
    layout = msgspec.structs.replace(bare, seeds=seeds_of(bare))
    if problems := problems_of(layout):
        raise LayoutUnsafe("this layout cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))
    return layout


def seeds_of(layout: Layout) -> tuple[str, ...]:
    """The first disk of each failure domain, an odd number of them: the replicas of the system partition. Where no
    operator is trusted alone, none has a majority of them.
    """
    first: dict[str, str] = {}
    for disk_id, domain in layout.domain_by_disk.items():
        first.setdefault(domain, disk_id)
    for count in range(SEEDS_MAX, 1, -2):
        found: list[str] = []
        for disk_id in first.values():
            if not layout.spreads or layout.operator_share((*found, disk_id)) <= minority_of(count):
                found.append(disk_id)
        if len(found) >= count:
            return tuple(found[:count])
    count = min(len(first), SEEDS_MAX)
    return tuple(first.values())[: count - 1 if count % 2 == 0 else count]


def sign_layout(authority: issuing.Authority, layout: Layout, folders: list[Path]) -> None:
    """Signs the layout, and those that may follow it when a seed disk is lost (``cluster.presigned``). Writes it beside
    the authority's keys, and into each node's identity.

    A node reads it there at its next start or reload.
    """
    signed = signed_layout.sign_layout(layout, authority.administration)
    signed = msgspec.structs.replace(signed, following=presign(signed, authority.administration.sign))
    base = _base_of(authority, layout)
    keep_layout(authority, signed, layout)
    write_private(authority.directory / LAYOUT_NAME, encode(signed))
    for folder in folders:
        write_private(folder / "identity" / LAYOUT_NAME, encode(signed))
        if base is not None:
            write_private(folder / "identity" / BASE_NAME, base)


def _base_of(authority: issuing.Authority, layout: Layout) -> bytes | None:
    """The layout that placed the keys that never moved, as a new node gets it; None when that is ``layout``."""
    if not layout.base:
        return None
    path = layout_path(authority, layout.base)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise OperatorError(
            f"layout {layout.base}, which placed the keys that never moved, is not in this folder, and new nodes need"
            f" it. Copy layouts/layout-{layout.base:012d}.signed from the directory of a gateway to {path}."
        ) from None


def layout_path(authority: issuing.Authority, epoch: int) -> Path:
    """Where a layout lies that was signed here, or adopted."""
    return authority.directory / "layouts" / f"layout-{epoch}.signed"


def keep_layout(authority: issuing.Authority, signed: signed_layout.SignedLayout, layout: Layout) -> None:
    write_private(layout_path(authority, layout.epoch), encode(signed))


def storage_config(node: NodePlan, directory: str, listen: str, extra: str = "") -> str:
    """A storage node's configuration as TOML. ``extra`` is appended as it is."""
    disks = "".join(f'\n[[disks]]\nid = "{disk.id}"\ndirectory = {quoted(disk.directory)}\n' for disk in node.disks)
    return _head(node, directory) + f"{disks}\n[rpc]\nlisten = {quoted(listen)}\n{extra}"


def gateway_config(
    node: NodePlan,
    directory: str,
    s3_listen: str,
    region: str,
    keys: dict[str, str],
    extra: str = "",
    *,
    workers: int = 1,
) -> str:
    """A gateway's configuration as TOML; ``keys`` are the options of its [keys] section."""
    several = f"workers = {workers}\n" if workers > 1 else ""
    options = "".join(f"{name} = {quoted(value)}\n" for name, value in keys.items())
    return (
        _head(node, directory)
        + f"\n[s3]\nlisten = {quoted(s3_listen)}\nregion = {quoted(region)}\n{several}\n[keys]\n{options}{extra}"
    )


def _head(node: NodePlan, directory: str) -> str:
    roles = ", ".join(quoted(role) for role in node.roles)
    return (
        f"[node]\nname = {quoted(node.name)}\ndirectory = {quoted(directory)}\nroles = [{roles}]\n\n[cluster]\nidentity"
        ' = "identity"\n'
    )


def quoted(text: str) -> str:
    """A TOML basic string: JSON's escapes are a subset of TOML's."""
    return msgspec.json.encode(text).decode()


def write_private(path: Path, content: bytes) -> None:
    """A whole file or none, synced, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(path, content)
