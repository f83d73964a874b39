"""The commands are one language: the same argument has one name and one place, and every command can speak JSON."""

from __future__ import annotations

import click

from storaged.cli.main import cli

WITHOUT_JSON = {"cluster create", "cluster issue", "cluster layout", "cluster adopt", "cluster recover"}


def commands_of(group: click.Group, context: click.Context, before: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command, path = group.get_command(context, name), f"{before} {name}".strip()
        assert command is not None
        found |= commands_of(command, context, path) if isinstance(command, click.Group) else {path: command}
    return found


def test_all_commands_on_the_folder_of_an_authority_are_alike() -> None:
    context = click.Context(cli)
    groups = ("cluster", "disk", "rack", "node", "gateway")
    found = {path: one for path, one in commands_of(cli, context).items() if path.split()[0] in groups}
    on_folder = 0
    for path, command in found.items():
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        if not any(one.name == "directory" for one in arguments) or path.endswith(" join"):
            continue
        on_folder += 1
        assert arguments[0].make_metavar(context) == "AUTHORITY", path
        options = {name for one in command.params for name in one.opts}
        assert ("--json" in options) == (path not in WITHOUT_JSON), path
        assert "of DIRECTORY" not in (command.help or ""), path
    assert on_folder > 20
