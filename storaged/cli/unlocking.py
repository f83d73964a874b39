"""``storaged bucket sign-unlock`` and ``bucket unlock``: the break-glass of object lock, by two people
(``cluster.unlock``). ``bucket forget-lost``: removes versions that are lost.
"""

from __future__ import annotations

import time
import urllib.parse
from pathlib import Path
from typing import TextIO

import click

from storaged.cli.options import AUTHORITY, parse_time
from storaged.errors import UnlockRefused

DAY_S = 86_400
WORDS = click.option("--words", default=None, help="The words that it asks for, for scripts.")


@click.command("sign-unlock")
@AUTHORITY
@click.option("--bucket", required=True)
@click.option("--key", required=True)
@click.option("--version", required=True, metavar="ID", help="The version id, as ListObjectVersions prints it.")
@click.option("--reason", required=True, metavar="TEXT", help="For the audit log: who decided it, and why.")
@click.option("--within", default="24h", metavar="TIME", help="How long the order counts: up to 7d.")
@WORDS
def sign_unlock(
    directory: Path, bucket: str, key: str, version: str, reason: str, within: str, words: str | None
) -> None:
    """Sign an order to end the lock of one version, in the folder AUTHORITY. Changes nothing by itself.

    Retention in COMPLIANCE mode and legal holds end by it too. The operator of a gateway whose configuration allows it
    carries the order out: storaged bucket unlock FILE.
    """
    from storaged.cluster import issuing
    from storaged.cluster.unlock import UnlockOrder, sign_order

    authority = issuing.load_authority(directory)
    until_ms = int((time.time() + parse_time("--within", within, 60, 7 * DAY_S)) * 1000)
    order = UnlockOrder(authority.cluster, bucket, key, version, reason, until_ms)
    _confirm(order.words, words)
    click.echo(sign_order(order, authority.administration))


@click.command("unlock")
@click.argument("file", type=click.File("r"))
@WORDS
@click.pass_obj
def unlock(named: str | None, file: TextIO, words: str | None) -> None:
    """Carry out an order of sign-unlock (FILE; - for standard input): the version has no lock any more. It is not
    deleted. Run on a gateway that has break_glass = true in [s3]. It is in the audit log.
    """
    from storaged.cli.client import gateway
    from storaged.cli.target import find_directory
    from storaged.cluster.unlock import words_in

    document = file.read()
    bucket, wanted = words_in(document)
    _confirm(wanted, words)
    path = f"/v1/buckets/{urllib.parse.quote(bucket, safe='')}/unlock"
    found = gateway(find_directory(named), "POST", path, body={"order": document})
    click.echo(f"{found['bucket']}/{found['key']} version {found['version']} has no lock any more")


@click.command("forget-lost")
@click.argument("name")
@click.argument("key")
@WORDS
@click.pass_obj
def forget_lost(named: str | None, name: str, key: str, words: str | None) -> None:
    """Remove old versions of KEY whose page no server has any more.

    They can't be read, listed or deleted, so without this a bucket that has some can't be emptied. Do it when no disk
    comes back that may have the page. All other versions stay. It is in the audit log.
    """
    from storaged.cli.client import gateway
    from storaged.cli.target import find_directory

    place, path = find_directory(named), f"/v1/buckets/{urllib.parse.quote(name, safe='')}/lost"
    text = key.encode("utf-8", "surrogateescape").hex()
    count = gateway(place, "GET", path, query={"key": text})["versions"]
    if not count:
        click.echo(f"{name}/{key} has lost no versions")
        return
    _confirm(f"forget {count} versions of {name}/{key}", words)
    gateway(place, "POST", path, body={"key": text, "count": str(count)})
    click.echo(f"{name}/{key} has {count} versions less")


def _confirm(wanted: str, words: str | None) -> None:
    """Raises UnlockRefused."""
    if words is None:
        words = click.prompt(f"Type exactly: {wanted}\n", default="", show_default=False, prompt_suffix="> ", err=True)
    if words != wanted:
        raise UnlockRefused(f"Nothing was done: these are not the words {wanted!r}.")
