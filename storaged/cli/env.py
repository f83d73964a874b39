"""``storaged env``: the settings that S3 clients need for a trial cluster."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from storaged.cli.target import find_directory, read_dev, require_dev
from storaged.errors import NotATrialCluster

AWS_FUNCTION = (
    "# aws before 2.13 (1.29) does not know AWS_ENDPOINT_URL and would ask Amazon\n"
    'aws() { command aws --endpoint-url "$AWS_ENDPOINT_URL" "$@"; }\n'
)
"""For the aws command of Debian 11 and 12. Newer ones accept the option beside the environment."""


def settings(place: Path) -> dict[str, str]:
    """endpoint, region, access_key, secret_key, bucket of a trial cluster."""
    known = require_dev(place)
    credentials = json.loads((place / "credentials.json").read_text())
    return {
        "endpoint": f"http://127.0.0.1:{known['s3_port']}",
        "region": known["region"],
        "access_key": credentials["access_key"],
        "secret_key": credentials["secret_key"],
        "bucket": known["bucket"],
    }


def render_settings(client: str, found: dict[str, str], place: Path) -> str:
    """The set-up of one client (``shell``: what ``storaged env`` prints), from ``settings``."""
    endpoint, region, access, secret, bucket = (
        found[name] for name in ("endpoint", "region", "access_key", "secret_key", "bucket")
    )
    host = endpoint.removeprefix("http://")
    aws = (
        f"export AWS_ACCESS_KEY_ID={access}\nexport AWS_SECRET_ACCESS_KEY={shlex.quote(secret)}\n"
        f"export AWS_DEFAULT_REGION={region}\nexport AWS_ENDPOINT_URL={endpoint}\n{AWS_FUNCTION}"
    )
    profile = (
        f"# or for good: in ~/.aws/credentials\n#   [storaged]\n#   aws_access_key_id = {access}\n"
        f"#   aws_secret_access_key = {secret}\n"
        f"# and in ~/.aws/config; then: aws --profile storaged s3 ls s3://{bucket}/\n"
        f"#   [profile storaged]\n#   region = {region}\n#   endpoint_url = {endpoint}\n"
    )
    boto3 = (
        f"import boto3\n\ns3 = boto3.client(\n    's3',\n    endpoint_url={endpoint!r},\n    region_name={region!r},\n"
        f"    aws_access_key_id={access!r},\n    aws_secret_access_key={secret!r},\n)\n"
        f"print(s3.list_objects_v2(Bucket={bucket!r}))\n"
    )
    rclone = (
        f"# in rclone.conf; then: rclone ls storaged:{bucket}\n[storaged]\ntype = s3\nprovider = Other\n"
        f"access_key_id = {access}\nsecret_access_key = {secret}\nendpoint = {endpoint}\nregion = {region}\n"
        "force_path_style = true\n"
    )
    restic = (
        f"export AWS_ACCESS_KEY_ID={access}\nexport AWS_SECRET_ACCESS_KEY={shlex.quote(secret)}\n"
        f"export AWS_DEFAULT_REGION={region}\nexport RESTIC_REPOSITORY=s3:{endpoint}/{bucket}/restic\n"
        "# then choose RESTIC_PASSWORD and run: restic init\n"
    )
    s3cmd = (
        f"# in ~/.s3cfg; then: s3cmd ls s3://{bucket}\n[default]\naccess_key = {access}\nsecret_key = {secret}\n"
        f"host_base = {host}\nhost_bucket = {host}\nbucket_location = {region}\nuse_https = False\n"
        "signature_v2 = False\n"
    )
    return {
        "shell": aws + f"export STORAGED_DIR={shlex.quote(str(place))}\n",
        "aws": aws + f"# aws s3 ls s3://{bucket}/\n" + profile,
        "boto3": boto3,
        "rclone": rclone,
        "restic": restic,
        "s3cmd": s3cmd,
    }[client]


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="endpoint, region, access_key, secret_key, bucket.")
@click.option(
    "--for",
    "client",
    type=click.Choice(["aws", "boto3", "rclone", "restic", "s3cmd"]),
    default=None,
    help="A setup to paste, for one client.",
)
@click.pass_obj
def env(named: str | None, as_json: bool, client: str | None) -> None:
    """Print the settings S3 clients need; for a shell: eval "$(storaged env)"."""
    place = find_directory(named)
    if read_dev(place) is None:
        raise NotATrialCluster(
            f"{place} is a server's node: the secret keys of its users are shown once, when they are made"
        )
    found = settings(place)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(render_settings(client or "shell", found, place), nl=False)
