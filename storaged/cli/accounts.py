"""``storaged group``, ``key``, ``policy`` and ``role``: what an account has, for the operator. An account is a user
that ``storaged user add`` made without --account; its own administrators do the same with any client of IAM.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from storaged.cli.client import gateway
from storaged.cli.target import find_directory
from storaged.errors import OperatorError

F = TypeVar("F", bound=Callable[..., Any])

PAGE = "1000"


def call(named: str | None, account: str, action: str, **parameters: str) -> dict[str, Any]:
    """Performs an action of IAM on an account."""
    body = {"account": account, "action": action, **parameters}
    answer: dict[str, Any] = gateway(find_directory(named), "POST", "/v1/iam", body=body)
    return answer


def every(named: str | None, account: str, action: str, field: str, **parameters: str) -> list[Any]:
    """All rows of a list that comes in pages."""
    rows: list[Any] = []
    marker: dict[str, str] = {}
    while True:
        answer = call(named, account, action, MaxItems=PAGE, **marker, **parameters)
        rows += answer[field]
        if not answer["IsTruncated"]:
            return rows
        marker = {"Marker": answer["Marker"]}


def json_option(help_text: str) -> Callable[[F], F]:
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def show(rows: list[Any], as_json: bool, line: Callable[[Any], str]) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    for row in () if as_json else rows:
        click.echo(line(row))


def done(text: str, answer: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(answer, indent=2) if as_json else text)


def document_of(file: Path) -> str:
    """Raises OperatorError."""
    try:
        return file.read_text()
    except UnicodeDecodeError:
        raise OperatorError(f"{file} is not text") from None


FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

# --- groups -----------------------------------------------------------------------------------------------------------


@click.group()
def group() -> None:
    """Groups of an account's users. Policies of a group hold for its members (`storaged policy attach`)."""


@group.command("list")
@click.argument("account")
@json_option("A list of groups, as IAM has them, each with Users.")
@click.pass_obj
def group_list(named: str | None, account: str, as_json: bool) -> None:
    """The groups of ACCOUNT and their members."""
    groups = every(named, account, "ListGroups", "Groups")
    for found in groups:
        users = every(named, account, "GetGroup", "Users", GroupName=found["GroupName"])
        found["Users"] = [user["UserName"] for user in users]
    show(groups, as_json, lambda found: f"{found['GroupName']:<32} {' '.join(found['Users'])}".rstrip())


@group.command("add")
@click.argument("account")
@click.argument("name")
@json_option("The group, as IAM has it.")
@click.pass_obj
def group_add(named: str | None, account: str, name: str, as_json: bool) -> None:
    """Make the group NAME."""
    answer = call(named, account, "CreateGroup", GroupName=name)
    done(f"made the group {name}", answer["Group"], as_json)


@group.command("remove")
@click.argument("account")
@click.argument("name")
@json_option("An empty object.")
@click.pass_obj
def group_remove(named: str | None, account: str, name: str, as_json: bool) -> None:
    """Remove the group NAME, which has no members and no policies."""
    done(f"removed the group {name}", call(named, account, "DeleteGroup", GroupName=name), as_json)


@group.command("join")
@click.argument("account")
@click.argument("name")
@click.argument("user")
@json_option("An empty object.")
@click.pass_obj
def group_join(named: str | None, account: str, name: str, user: str, as_json: bool) -> None:
    """Put USER into the group NAME."""
    answer = call(named, account, "AddUserToGroup", GroupName=name, UserName=user)
    done(f"{user} is in the group {name}", answer, as_json)


@group.command("leave")
@click.argument("account")
@click.argument("name")
@click.argument("user")
@json_option("An empty object.")
@click.pass_obj
def group_leave(named: str | None, account: str, name: str, user: str, as_json: bool) -> None:
    """Take USER out of the group NAME."""
    answer = call(named, account, "RemoveUserFromGroup", GroupName=name, UserName=user)
    done(f"{user} is no longer in the group {name}", answer, as_json)


# --- keys -------------------------------------------------------------------------------------------------------------

_user_option = click.option(
    "--user", metavar="NAME", default="", help="Of this user of the account (default: its own)."
)


def _of(user: str) -> dict[str, str]:
    return {"UserName": user} if user else {}


@click.group()
def key() -> None:
    """Access keys of an account and its users: two each, so that they can be exchanged."""


@key.command("list")
@click.argument("account")
@_user_option
@json_option("A list of UserName, AccessKeyId, Status, CreateDate.")
@click.pass_obj
def key_list(named: str | None, account: str, user: str, as_json: bool) -> None:
    """The keys of ACCOUNT itself, or of one of its users."""
    rows = every(named, account, "ListAccessKeys", "AccessKeyMetadata", **_of(user))
    show(
        rows, as_json, lambda row: f"{row['AccessKeyId']:<28} {row['Status']:<10} {row['CreateDate']} {row['UserName']}"
    )


@key.command("add")
@click.argument("account")
@_user_option
@json_option("UserName, AccessKeyId, SecretAccessKey, Status, CreateDate.")
@click.pass_obj
def key_add(named: str | None, account: str, user: str, as_json: bool) -> None:
    """Make a key. Its secret is shown this once."""
    found = call(named, account, "CreateAccessKey", **_of(user))["AccessKey"]
    done(f"access_key  {found['AccessKeyId']}\nsecret_key  {found['SecretAccessKey']}", found, as_json)


@key.command("set")
@click.argument("account")
@click.argument("access_key", metavar="KEY")
@click.option("--active/--inactive", required=True, help="Whether it works.")
@_user_option
@json_option("An empty object.")
@click.pass_obj
def key_set(named: str | None, account: str, access_key: str, active: bool, user: str, as_json: bool) -> None:
    """Let KEY work, or not. Sessions that were made with it end when it does not."""
    status = "Active" if active else "Inactive"
    answer = call(named, account, "UpdateAccessKey", AccessKeyId=access_key, Status=status, **_of(user))
    done(f"{access_key} is {status.lower()}", answer, as_json)


@key.command("remove")
@click.argument("account")
@click.argument("access_key", metavar="KEY")
@_user_option
@json_option("An empty object.")
@click.pass_obj
def key_remove(named: str | None, account: str, access_key: str, user: str, as_json: bool) -> None:
    """Remove KEY for good."""
    answer = call(named, account, "DeleteAccessKey", AccessKeyId=access_key, **_of(user))
    done(f"removed {access_key}", answer, as_json)


# --- policies ---------------------------------------------------------------------------------------------------------


def _arn_of(named: str | None, account: str, policy: str) -> str:
    """Of a policy that is named by ARN or by name. Raises OperatorError."""
    if policy.startswith("arn:"):
        return policy
    found = every(named, account, "ListPolicies", "Policies")
    for row in found:
        if row["PolicyName"].lower() == policy.lower():
            return str(row["Arn"])
    raise OperatorError(f"{account} has no policy {policy!r}; `storaged policy list {account}` shows them")


_TARGETS = ("user", "group", "role")


def _target(**found: str) -> tuple[str, dict[str, str], str]:
    """The word in the name of IAM's action, the parameter, and the name, of the one option that was given. Raises
    UsageError."""
    given = [kind for kind in _TARGETS if found[kind]]
    if len(given) != 1:
        raise click.UsageError("Name one of --user, --group and --role.")
    word = given[0].capitalize()
    return word, {f"{word}Name": found[given[0]]}, found[given[0]]


def _target_options(command: F) -> F:
    for kind in reversed(_TARGETS):
        command = click.option(f"--{kind}", metavar="NAME", default="", help=f"A {kind} of the account.")(command)
    return command


@click.group()
def policy() -> None:
    """Policies of an account: who of its users, groups and roles may do what. AWS's AmazonS3FullAccess,
    AmazonS3ReadOnlyAccess, IAMFullAccess, IAMReadOnlyAccess and AdministratorAccess are there already.
    """


@policy.command("list")
@click.argument("account")
@json_option("A list of policies, as IAM has them.")
@click.pass_obj
def policy_list(named: str | None, account: str, as_json: bool) -> None:
    """The policies that can be attached in ACCOUNT, and to how many they are."""
    rows = every(named, account, "ListPolicies", "Policies")
    show(rows, as_json, lambda row: f"{row['PolicyName']:<32} {row['AttachmentCount']:>5} {row['Arn']}")


@policy.command("show")
@click.argument("account")
@click.argument("name")
@json_option("The policy's document.")
@click.pass_obj
def policy_show(named: str | None, account: str, name: str, as_json: bool) -> None:
    """The document of the policy NAME (or its ARN) that is in force."""
    arn = _arn_of(named, account, name)
    version = call(named, account, "GetPolicy", PolicyArn=arn)["Policy"]["DefaultVersionId"]
    found = call(named, account, "GetPolicyVersion", PolicyArn=arn, VersionId=version)
    click.echo(json.dumps(found["PolicyVersion"]["Document"], indent=2))


@policy.command("add")
@click.argument("account")
@click.argument("name")
@click.argument("file", type=FILE)
@json_option("The policy, as IAM has it.")
@click.pass_obj
def policy_add(named: str | None, account: str, name: str, file: Path, as_json: bool) -> None:
    """Make the policy NAME from FILE (JSON)."""
    answer = call(named, account, "CreatePolicy", PolicyName=name, PolicyDocument=document_of(file))
    done(f"made {answer['Policy']['Arn']}", answer["Policy"], as_json)


@policy.command("remove")
@click.argument("account")
@click.argument("name")
@json_option("An empty object.")
@click.pass_obj
def policy_remove(named: str | None, account: str, name: str, as_json: bool) -> None:
    """Remove the policy NAME (or its ARN), which is attached to nothing."""
    answer = call(named, account, "DeletePolicy", PolicyArn=_arn_of(named, account, name))
    done(f"removed the policy {name}", answer, as_json)


@policy.command("attach")
@click.argument("account")
@click.argument("name")
@_target_options
@json_option("An empty object.")
@click.pass_obj
def policy_attach(named: str | None, account: str, name: str, user: str, group: str, role: str, as_json: bool) -> None:
    """Attach the policy NAME (or its ARN) to a user, group or role."""
    word, parameter, target = _target(user=user, group=group, role=role)
    answer = call(named, account, f"Attach{word}Policy", PolicyArn=_arn_of(named, account, name), **parameter)
    done(f"{name} holds for the {word.lower()} {target}", answer, as_json)


@policy.command("detach")
@click.argument("account")
@click.argument("name")
@_target_options
@json_option("An empty object.")
@click.pass_obj
def policy_detach(named: str | None, account: str, name: str, user: str, group: str, role: str, as_json: bool) -> None:
    """Detach the policy NAME (or its ARN) from a user, group or role."""
    word, parameter, target = _target(user=user, group=group, role=role)
    answer = call(named, account, f"Detach{word}Policy", PolicyArn=_arn_of(named, account, name), **parameter)
    done(f"{name} does not hold for the {word.lower()} {target}", answer, as_json)


# --- roles ------------------------------------------------------------------------------------------------------------


@click.group()
def role() -> None:
    """Roles of an account: rights that users assume for a time (AssumeRole)."""


@role.command("list")
@click.argument("account")
@json_option("A list of roles, as IAM has them.")
@click.pass_obj
def role_list(named: str | None, account: str, as_json: bool) -> None:
    """The roles of ACCOUNT."""
    show(every(named, account, "ListRoles", "Roles"), as_json, lambda row: f"{row['RoleName']:<32} {row['Arn']}")


@role.command("show")
@click.argument("account")
@click.argument("name")
@json_option("The role, as IAM has it.")
@click.pass_obj
def role_show(named: str | None, account: str, name: str, as_json: bool) -> None:
    """Who may assume the role NAME, and its settings."""
    click.echo(json.dumps(call(named, account, "GetRole", RoleName=name)["Role"], indent=2))


@role.command("add")
@click.argument("account")
@click.argument("name")
@click.argument("file", type=FILE)
@json_option("The role, as IAM has it.")
@click.pass_obj
def role_add(named: str | None, account: str, name: str, file: Path, as_json: bool) -> None:
    """Make the role NAME. FILE (JSON) is its trust policy: it says who may assume the role."""
    document = document_of(file)
    answer = call(named, account, "CreateRole", RoleName=name, AssumeRolePolicyDocument=document)
    done(f"made {answer['Role']['Arn']}", answer["Role"], as_json)


@role.command("remove")
@click.argument("account")
@click.argument("name")
@json_option("An empty object.")
@click.pass_obj
def role_remove(named: str | None, account: str, name: str, as_json: bool) -> None:
    """Remove the role NAME, which has no policies. Its sessions end."""
    done(f"removed the role {name}", call(named, account, "DeleteRole", RoleName=name), as_json)
