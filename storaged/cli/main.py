"""The command ``storaged``: finds the subcommand, imports only that one, and turns errors into messages and exit codes.

Each command lives in a module of its group and is imported when it is called, so that ``--help`` costs click alone.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from storaged import __version__
from storaged.errors import OperatorError, StoragedError

COMMANDS: dict[str, tuple[str, str]] = {
    "audit": ("storaged.cli.audit:audit", "Check the hash-chained audit log."),
    "bucket": ("storaged.cli.buckets:bucket", "Make, list, count, hand over and delete buckets."),
    "cluster": ("storaged.cli.cluster:cluster", "Make a cluster's certificates, configuration and layout."),
    "config": ("storaged.cli.run:config_group", "Check a configuration file."),
    "dev": ("storaged.cli.dev:dev", "A whole cluster on this machine, for trying."),
    "disk": ("storaged.cli.disks:disk", "Add, drain, remove and replace disks."),
    "doctor": (
        "storaged.cli.operate:doctor",
        "Look for what will hurt later: clocks, disks, certificates, key backup.",
    ),
    "env": ("storaged.cli.env:env", "Print the settings S3 clients need."),
    "explain": ("storaged.cli.operate:explain", "What a named error or state means, and what to do."),
    "fsck": ("storaged.cli.operate:fsck", "Check or rebuild a disk's index, while its node is stopped."),
    "gateway": ("storaged.cli.nodes:gateway", "Invite gateways, and let them join."),
    "group": ("storaged.cli.accounts:group", "Groups of an account's users."),
    "job": ("storaged.cli.jobs:job", "Long work; pause, resume and pace what moves data."),
    "key": ("storaged.cli.accounts:key", "Access keys of an account and its users."),
    "keys": ("storaged.cli.keys:keys", "Make, back up and restore the keyring."),
    "node": ("storaged.cli.nodes:node", "Invite servers, let them join, drain, remove and replace them."),
    "policy": ("storaged.cli.accounts:policy", "Policies of an account, and to whom they are attached."),
    "rack": ("storaged.cli.racks:rack", "Rename racks, and say who operates them."),
    "repair": ("storaged.cli.operate:repair", "How repair gets on."),
    "role": ("storaged.cli.accounts:role", "Roles of an account, which users assume for a time."),
    "run": ("storaged.cli.run:run", "Run a node: the daemon."),
    "scrub": ("storaged.cli.operate:scrub", "Read and verify everything on the disks."),
    "status": ("storaged.cli.status:status", "Is the data safe, and what to do now."),
    "user": ("storaged.cli.users:user", "Add, list and remove S3 users."),
    "where": ("storaged.cli.status:where", "Which disk and rack holds which fragment of an object."),
}


class LazyGroup(click.Group):
    """Lists commands from the table above, and imports a command's module only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        # Where rich is installed, structlog imports it, for tracebacks that are never printed (``observe.logs``). This
        # is a fifth of the time in which a node starts.
        sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
        module, _, attribute = entry[0].partition(":")
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises UsageError for a command that does not exist, with the names that are near to it."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS)
            suggestion = f" Did you mean {' or '.join(near)}?" if near else " `storaged --help` lists them."
            raise click.UsageError(f"There is no command {args[0]!r}.{suggestion}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="storaged")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    default=None,
    help="The cluster's (or a node's) directory; else STORAGED_DIR, else the trial cluster that runs, or ran last.",
)
@click.pass_context
def cli(ctx: click.Context, directory: str | None) -> None:
    """A distributed, S3-compatible object store whose data and keys stay under EU law."""
    ctx.obj = directory or os.environ.get("STORAGED_DIR") or None


def report(error: StoragedError, *, as_json: bool = False) -> None:
    """Message, code and hint on standard error; with ``--json`` also as a document on standard output.

    A script that asked for JSON reads one document in every case: the answer, or ``{"error": {code, message, hint}}``.
    """
    if as_json:
        click.echo(_error_document(error.code, error.message, error.hint))
    click.echo(f"storaged: {error.message}", err=True)
    if error.hint:
        click.echo(f"  {error.hint}", err=True)
    if error.code != "OPERATOR_ERROR":
        click.echo(f"  More: storaged explain {error.code}", err=True)


def _error_document(code: str, message: str, hint: str) -> str:
    return json.dumps({"error": {"code": code, "message": message, "hint": hint}}, indent=2)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether ``--json`` is among the options: a command that failed cannot be asked any more."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line and exits: 0 fine, 1 refused, 2 wrong usage or down, 130 interrupted."""
    as_json = _wants_json(sys.argv[1:] if arguments is None else arguments)
    try:
        result: Any = cli.main(args=arguments, prog_name="storaged", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        if as_json:
            click.echo(_error_document(OperatorError.code, error.format_message(), OperatorError.hint))
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except StoragedError as error:
        report(error, as_json=as_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if os.environ.get("STORAGED_TRACEBACK"):
            raise
        place = f" {error.filename}" if error.filename else ""
        report(OperatorError(f"{error.strerror or error}{place}"), as_json=as_json)
        sys.exit(1)


if __name__ == "__main__":
    main()
