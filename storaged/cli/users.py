"""``storaged user``: accounts (users that own buckets), and users of an account, whom its policies limit."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import click

from storaged.cli.accounts import call, every
from storaged.cli.client import gateway
from storaged.cli.quotas import user_quota
from storaged.cli.target import find_directory
from storaged.errors import OperatorError

_account_option = click.option(
    "--account",
    metavar="ACCOUNT",
    default="",
    help="A user of this account, whom policies limit (default: an account).",
)


@click.group()
def user() -> None:
    """Add, list and remove S3 users. Each sees its own buckets, and is an account that may have users of its own."""


@user.command("add")
@click.argument("name")
@click.option(
    "--user-id",
    default="",
    metavar="ID",
    help="Share the buckets of this user, present or removed (default: a user with none).",
)
@click.option("--email", default="", metavar="ADDRESS", help="Access control lists may name the user by it.")
@_account_option
@click.option("--json", "as_json", is_flag=True, help="user_id, account, arn, access_key, secret_key.")
@click.pass_obj
def user_add(named: str | None, name: str, user_id: str, email: str, account: str, as_json: bool) -> None:
    """Make a user with random keys. The secret key is shown this once.

    Bucket policies name a user by its account or its ARN, access control lists by its user id.

    A user of an ACCOUNT may do nothing until a policy allows it: storaged policy attach ACCOUNT POLICY --user NAME

    To exchange the keys of a user: storaged key add, let clients change over, storaged key remove.
    """
    if account:
        if user_id or email:
            raise click.UsageError("--user-id and --email are an account's own.")
        found = _add_to(named, account, name)
    else:
        body = {"name": name, "user_id": user_id, "email": email}
        found = gateway(find_directory(named), "POST", "/v1/users", body=body)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(
            f"user_id     {found['user_id']}\naccount     {found['account']}\narn         {found['arn']}\n"
            f"access_key  {found['access_key']}\nsecret_key  {found['secret_key']}"
        )


def _add_to(named: str | None, account: str, name: str) -> dict[str, str]:
    made = call(named, account, "CreateUser", UserName=name)["User"]
    key = call(named, account, "CreateAccessKey", UserName=name)["AccessKey"]
    return {
        "user_id": made["UserId"],
        "account": made["Arn"].split(":")[4],
        "arn": made["Arn"],
        "access_key": key["AccessKeyId"],
        "secret_key": key["SecretAccessKey"],
    }


@user.command("list")
@_account_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A list of user_id, account, arn, name, access_key, email; of an account's users of user_id, arn, name.",
)
@click.pass_obj
def user_list(named: str | None, account: str, as_json: bool) -> None:
    """All users, without their secrets: accounts, one line for each of their keys, or the users of one account."""
    if account:
        rows = every(named, account, "ListUsers", "Users")
        found = [{"user_id": row["UserId"], "arn": row["Arn"], "name": row["UserName"]} for row in rows]
    else:
        found = gateway(find_directory(named), "GET", "/v1/users")["users"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    for who in () if as_json else found:
        more = who["arn"] if account else f"{who['access_key']:<24} {who['account']} {who['user_id']}"
        click.echo(f"{who['name']:<24} {more}")


@user.command("remove")
@click.argument("name")
@_account_option
@click.option("--json", "as_json", is_flag=True, help="removed, user_id.")
@click.pass_obj
def user_remove(named: str | None, name: str, account: str, as_json: bool) -> None:
    """Remove a user, by name or access key, with all its keys. Its buckets stay; a user that is added with its id gets
    them. The users of an account stop working with the account's last own user, and work again when one is added.
    """
    if account:
        found = _remove_from(named, account, name)
        said = f"removed {name}"
    else:
        found = gateway(find_directory(named), "DELETE", f"/v1/users/{urllib.parse.quote(name, safe='')}")
        said = (
            f"removed {name}; its buckets stay, and are reached again with: storaged user add NAME --user-id"
            f" {found['user_id']}"
        )
    click.echo(json.dumps(found, indent=2) if as_json else said)


user.add_command(user_quota)


def _remove_from(named: str | None, account: str, name: str) -> dict[str, Any]:
    """With its keys, its policies, and its places in groups. Raises OperatorError for a user that does not exist."""
    who = {"UserName": name}
    known = every(named, account, "ListUsers", "Users")
    found = next((row for row in known if row["UserName"].lower() == name.lower()), None)
    if found is None:
        raise OperatorError(f"{account} has no user {name!r}; `storaged user list --account {account}` shows them")
    for key in every(named, account, "ListAccessKeys", "AccessKeyMetadata", **who):
        call(named, account, "DeleteAccessKey", AccessKeyId=key["AccessKeyId"], **who)
    for policy in every(named, account, "ListUserPolicies", "PolicyNames", **who):
        call(named, account, "DeleteUserPolicy", PolicyName=policy, **who)
    for attached in every(named, account, "ListAttachedUserPolicies", "AttachedPolicies", **who):
        call(named, account, "DetachUserPolicy", PolicyArn=attached["PolicyArn"], **who)
    for group in every(named, account, "ListGroupsForUser", "Groups", **who):
        call(named, account, "RemoveUserFromGroup", GroupName=group["GroupName"], **who)
    call(named, account, "DeleteUser", **who)
    return {"removed": found["UserName"], "user_id": found["UserId"]}
