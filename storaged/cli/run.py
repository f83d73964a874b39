"""``storaged run``: the daemon; ``storaged config check``: its configuration, checked."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import click


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Leaves out a fifth of the work of importing a node.

    What is imported stays, so the garbage collector need not look at it. aiohttp reads the certificate authorities of
    the system (SSL_CERT_FILE) as it is imported, for clients, and a node has none of its clients.
    """
    authorities = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = os.devnull
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        del os.environ["SSL_CERT_FILE"]
        if authorities is not None:
            os.environ["SSL_CERT_FILE"] = authorities


@click.command()
@click.argument("config", metavar="CONFIG.toml", type=click.Path(path_type=Path))
@click.option(
    "--parent",
    type=int,
    default=0,
    hidden=True,
    help="The process that starts this one, which ends with it (used by `storaged dev`, and for workers).",
)
@click.option(
    "--worker",
    type=int,
    default=0,
    hidden=True,
    help="The number of a further process of a gateway (used by its first one).",
)
@click.option("--door", type=int, default=-1, hidden=True)
@click.option("--talk", type=int, default=-1, hidden=True)
def run(config: Path, parent: int, worker: int, door: int, talk: int) -> int:
    """Run the node that CONFIG.toml describes, in the foreground. SIGTERM drains and ends it, SIGHUP reloads the
    configuration.
    """
    with importing():
        from storaged.node.daemon import run_node, run_worker
    if worker:
        return run_worker(config, parent, worker, door, talk)
    return run_node(config, parent=parent)


@click.group("config")
def config_group() -> None:
    """Check a configuration file."""


@config_group.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def config_check(file: Path) -> None:
    """List every mistake in FILE with its line; exit code 1 when there is one."""
    from storaged import config

    found = config.load(file)
    click.echo(f"{file}: fine ({', '.join(found.node.roles)} node {found.node.name}, {len(found.disks)} disks)")
