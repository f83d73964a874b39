"""``storaged keys``: makes the keyring once, backs it up, restores it. A cluster that has data never gets another."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import click

from storaged.cli.client import gateway
from storaged.cli.target import find_directory, gateway_directory
from storaged.errors import ConfigInvalid, OperatorError


@click.group()
def keys() -> None:
    """Make, back up and restore the keyring of a cluster's gateways."""


def create_with_credential(directory: Path) -> None:
    """Makes a credential and a keyring under it, for a new cluster. Raises FileExistsError."""
    from storaged import keys as plane

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    plane.create_keyring(directory / "keyring", plane.Credential.create(directory / "credential"))


STANDARD_INPUT = "-"
FILE_HELP = "Its first line is the passphrase; - is standard input (default: asked for on the terminal)."


def _has_terminal() -> bool:
    """Whether there is a terminal that can read a passphrase without showing it, as getpass(3) does."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _read_passphrase(file: Path | None, *, new: bool) -> str:
    """The passphrase of a backup, from ``file``, standard input or the terminal.

    ``new``: it protects a new backup, so it must have CHARS_MIN characters.
    Raises PassphraseTooShort, OperatorError.
    """
    from storaged.passphrase import CHARS_MIN, require_long

    if file is not None and str(file) == STANDARD_INPUT:
        text: str = sys.stdin.readline().rstrip("\n")
        if not text:
            raise OperatorError("the first line of standard input is empty; it is the passphrase")
    elif file is not None:
        from storaged.node.protection import read_passphrase

        text = read_passphrase(file)
    elif not _has_terminal():
        raise OperatorError(
            "there is no terminal to ask for the passphrase on: give --passphrase-file FILE (its first line), or"
            " --passphrase-file - and the passphrase on standard input"
        )
    else:
        rule = f" ({CHARS_MIN} characters or more)" if new else ""
        text = click.prompt(f"Passphrase of the backup{rule}", hide_input=True, confirmation_prompt=new)
    if new:
        require_long(text)
    return text


@keys.command("create")
@click.argument("config", metavar="CONFIG.toml", type=click.Path(path_type=Path))
def create(config: Path) -> None:
    """Make the keyring of a NEW cluster, where CONFIG.toml of its first gateway says. Further gateways get a copy: keys
    restore.
    """
    from storaged import config as configuration
    from storaged import keys as plane
    from storaged.node.protection import protection_of

    found = configuration.load(config)
    if not found.gateway:
        raise ConfigInvalid(f"{config} is not a gateway's: only gateways have keys")
    path, protection = Path(found.keys.keyring), protection_of(found, create=True)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    material = plane.create_keyring(path, protection)
    click.echo(f"keyring {material.keyring_id.hex()} is in {path}")
    click.echo(f"  Next: start the gateway, then: storaged --dir {found.node.directory} keys backup FILE")


@keys.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--passphrase-file", metavar="FILE", type=click.Path(path_type=Path), default=None, help=FILE_HELP)
@click.pass_obj
def backup(named: str | None, file: Path, passphrase_file: Path | None) -> None:
    """Write a backup of the running gateway's keyring to FILE, under a passphrase, with all bucket keys made so far.
    Its epoch keys open later ones too.
    """
    place = find_directory(named)
    passphrase = _read_passphrase(passphrase_file, new=True)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OperatorError(f"{file} exists already; it was left as it is") from None
    try:
        with os.fdopen(descriptor, "wb") as out:
            answer = gateway(place, "POST", "/v1/keys/backup", body={"passphrase": passphrase}, timeout_s=120.0)
            out.write(base64.b64decode(answer["backup"]))
            out.flush()
            os.fsync(out.fileno())
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    click.echo(f"keyring {answer['keyring']} is backed up in {file}. Keep it, and its passphrase, off this machine.")


def _give_to_owner(file: Path) -> None:
    """Gives a file that root restored to the owner of its directory, as the gateway must read it."""
    if os.geteuid() == 0:
        owner = file.parent.stat()
        os.chown(file, owner.st_uid, owner.st_gid)


@keys.command("restore")
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=None,
    help="The gateway's CONFIG.toml (default: the cluster's named by --dir).",
)
@click.option("--passphrase-file", metavar="FILE", type=click.Path(path_type=Path), default=None, help=FILE_HELP)
@click.pass_obj
def restore(named: str | None, file: Path, config_file: Path | None, passphrase_file: Path | None) -> None:
    """Put the keyring from the backup FILE where the gateway's configuration wants it, and the bucket keys beside it
    for the gateway to take.

    An existing keyring is never overwritten. Where it is the backup's own, the bucket keys alone are restored: for a
    ring that lost some.
    """
    from storaged import config as configuration
    from storaged import keys as plane
    from storaged.keys.copies import RESTORED_NAME
    from storaged.node.protection import protection_of
    from storaged.wire import encode

    found = configuration.load(config_file or gateway_directory(find_directory(named)) / "config.toml")
    target, directory = Path(found.keys.keyring), Path(found.node.directory)
    known = plane.keyring_id_of(target) if target.exists() else None
    passphrase = _read_passphrase(passphrase_file, new=False)
    # Before anything is written: a wrong passphrase changes nothing.
    saved = plane.open_backup(file, passphrase, expected_id=known)
    if known is not None and not saved.has_bucket_keys:
        raise OperatorError(
            f"{target} exists already; it was left as it is, and {file}, made by an older version, has no bucket keys"
        )
    protection = protection_of(found, create=True) if known is None else None
    if saved.bucket_keys:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        plane.write_restored(directory, saved.material.keyring_id, map(encode, saved.bucket_keys))
        _give_to_owner(directory / RESTORED_NAME)
    if protection is not None:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        plane.restore(file, passphrase, target, protection=protection)
        _give_to_owner(target)
    said = "is in" if known is None else "was already in"
    click.echo(
        f"keyring {saved.material.keyring_id.hex()} {said} {target}; {len(saved.bucket_keys)} bucket keys lie ready in"
        f" {directory}"
    )
    click.echo(
        "  Next: the gateway takes it when it starts, or is reloaded (systemctl reload storaged-gateway; of a trial"
        " cluster: SIGHUP)"
    )
