"""What an operator can do with a running cluster, through the commands alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from storaged.cli.client import request
from storaged.cli.supervisor import STORAGE_NICE
from tests.cluster import RACKS, STORAGED, Cluster, free_port


def node_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    node: dict[str, Any] = next(node for node in found["nodes"] if node["name"] == name)
    return node


def healthy_status(cluster: Cluster) -> dict[str, Any]:
    """A healthy cluster's document: on a busy machine nodes may still be noticing each other."""
    seen: list[dict[str, Any]] = []

    def healthy() -> bool:
        seen.append(cluster.status())
        return bool(seen[-1]["verdict"] == "HEALTHY")

    cluster.wait_until(healthy, 60, "HEALTHY")
    return seen[-1]


def problem_codes(found: dict[str, Any]) -> set[str]:
    return {entry["code"] for entry in found["problems"]}


def http(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def admin_url(cluster: Cluster) -> str:
    return f"http://127.0.0.1:{json.loads((cluster.directory / 'dev.json').read_text())['admin_port']}"


def round_trip(cluster: Cluster, key: str, size: int = 300_000) -> None:
    client, body = cluster.boto3(attempts=3), os.urandom(size)
    client.put_object(Bucket="demo", Key=key, Body=body)
    assert client.get_object(Bucket="demo", Key=key)["Body"].read() == body


def test_a_new_cluster_is_healthy_and_says_where_everything_is(cluster: Cluster) -> None:
    found = healthy_status(cluster)
    assert (found["objects_below_target"], found["objects_lost"], found["problems"]) == (0, 0, [])
    assert {node["name"]: node["rack"] for node in found["nodes"]} == {**RACKS, "gateway": "FR/par1/a"}
    assert node_of(found, "gateway")["roles"] == ["gateway"]
    for name in RACKS:
        node = node_of(found, name)
        assert (node["roles"], node["state"], node["directory"]) == (["storage"], "up", str(cluster.directory / name))
        words = Path(f"/proc/{node['pid']}/cmdline").read_bytes().split(b"\0")
        assert words[words.index(b"run") :][:3] == [
            b"run",
            str(cluster.directory / name / "config.toml").encode(),
            b"--parent",
        ]
        assert len(node["disks"]) == 2
        for disk in node["disks"]:
            assert disk["state"] == "ok"
            assert Path(disk["directory"]).is_dir()
            assert isinstance(disk["bytes_used"], int)
    assert len({node["pid"] for node in found["nodes"]}) == 4


def test_secrets_lie_in_private_files_and_listeners_on_loopback(cluster: Cluster) -> None:
    for path in (
        "credentials.json",
        "gateway/keys/keyring",
        "gateway/keys/credential",
        "authority/authority.key",
        "n1/identity/node.key",
        "dev.sock",
        "n1/admin.sock",
    ):
        assert stat.S_IMODE((cluster.directory / path).stat().st_mode) == 0o600, path
    for path in (
        *cluster.directory.glob("n1/d*/**/*"),
        *cluster.directory.glob("n1/layouts/*"),
        *cluster.directory.glob("gateway/audit/*"),
    ):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path  # rows tell names and sizes
    limits = Path(f"/proc/{cluster.pids()['gateway']}/limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == [
        "0",
        "0",
    ]  # it would hold keys
    ours = inodes_of(cluster)
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    listening = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in ours}
    assert listening == {"0100007F"}


def descriptors_of(pid: int) -> list[Path]:
    """A gateway's are its own: only root may look at them."""
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        pytest.skip("a gateway's open descriptors can be seen by root only")


def inodes_of(cluster: Cluster) -> set[str]:
    found = set()
    for pid in cluster.pids().values():
        for descriptor in descriptors_of(pid):
            target = os.readlink(descriptor) if descriptor.is_symlink() else ""
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def test_storage_nodes_give_way_to_the_gateway_in_its_session(cluster: Cluster) -> None:
    pids = cluster.pids()
    own = os.getpriority(os.PRIO_PROCESS, pids["gateway"])
    threads = [int(thread) for name in RACKS for thread in os.listdir(f"/proc/{pids[name]}/task")]
    assert len(threads) > len(RACKS)
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {min(own + STORAGE_NICE, 19)}
    assert len({os.getsid(pid) for pid in pids.values()}) == 1
    assert len({os.getpgid(pid) for pid in pids.values()}) == 4


def test_no_storage_process_has_code_that_handles_keys(cluster: Cluster) -> None:
    for name in RACKS:
        modules = request(cluster.directory / name, "GET", "/v1/modules")["modules"]
        assert "storaged.fragments.store" in modules
        assert [
            module for module in modules if module.startswith(("storaged.keys", "storaged.s3", "storaged.node.gateway"))
        ] == []
        assert not (cluster.directory / name / "keys").exists()
    assert "storaged.keys.keyring" in request(cluster.directory / "gateway", "GET", "/v1/modules")["modules"]


def test_where_names_every_fragment_and_what_may_fail(cluster: Cluster) -> None:
    cluster.boto3().put_object(Bucket="demo", Key="where/é ü+%20", Body=os.urandom(400_000))
    # A disk that is late is left out of a write that is safe without it, and repaired after it: on a busy machine that
    # takes a moment.
    cluster.wait_until(lambda: cluster.where("demo", "where/é ü+%20")["disks_may_fail"] == 2, 60, "six fragments")
    found = cluster.where("demo", "where/é ü+%20")
    assert len(found["fragments"]) == 6
    assert {(row["node"], row["rack"]) for row in found["fragments"]} == set(RACKS.items())
    assert {row["state"] for row in found["fragments"]} == {"ok"}
    assert (found["disks_may_fail"], found["racks_may_fail"]) == (2, 1)
    assert said_where(cluster, "where/é ü+%20") == found
    assert "FR/par2/b" in cluster.run("where", "s3://demo/where/é ü+%20").stdout
    for key in ("/lead//x/", "a%2Fb?c#d", "..", "q'\"<>&\\", " ", "line\nbreak", "\N{GRINNING FACE}"):
        cluster.boto3().put_object(Bucket="demo", Key=key, Body=b"odd")
        assert said_where(cluster, key)["key"] == key
        cluster.boto3().delete_object(Bucket="demo", Key=key)
    missing = cluster.run("where", "s3://demo/absent", check=False)
    assert missing.returncode == 1
    assert "does not exist" in missing.stderr
    assert "Traceback" not in missing.stderr


def said_where(cluster: Cluster, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.run("where", f"s3://demo/{key}", "--json").stdout)
    return found


def test_users_see_their_own_buckets_and_end_with_their_removal(cluster: Cluster) -> None:
    made = json.loads(cluster.run("user", "add", "alice", "--json").stdout)
    assert set(made) == {"user_id", "account", "arn", "access_key", "secret_key"}
    client = client_of(cluster, made)
    assert client.list_buckets()["Buckets"] == []
    client.create_bucket(Bucket="alices")
    listed = json.loads(cluster.run("user", "list", "--json").stdout)
    public = {name: made[name] for name in ("user_id", "account", "arn", "access_key")}
    assert {**public, "name": "alice", "email": ""} in listed
    assert made["secret_key"] not in cluster.run("user", "list").stdout
    taken = cluster.run("user", "add", "alice", check=False)
    assert taken.returncode == 1
    assert "alice" in taken.stderr
    assert made["user_id"] in cluster.run("user", "remove", "alice").stdout
    cluster.wait_until(lambda: "InvalidAccessKeyId" in refusal(client), 3, "the removed user to be refused")
    heir = json.loads(cluster.run("user", "add", "alice", "--user-id", made["user_id"], "--json").stdout)
    assert heir["access_key"] != made["access_key"]
    assert [bucket["Name"] for bucket in client_of(cluster, heir).list_buckets()["Buckets"]] == ["alices"]
    client_of(cluster, heir).delete_bucket(Bucket="alices")
    for name, word in (("alice2", "64 hexadecimal digits"), (" ", "printable characters")):
        done = cluster.run("user", "add", name, "--user-id", "x", check=False)
        assert (done.returncode, word in done.stderr) == (1, True)


def test_an_operator_lists_counts_hands_over_and_deletes_buckets(cluster: Cluster) -> None:
    owners = [json.loads(cluster.run("user", "add", name, "--json").stdout) for name in ("carla", "dario")]
    clients = [client_of(cluster, owner) for owner in owners]
    clients[0].create_bucket(Bucket="carlas")
    for number in range(3):
        clients[0].put_object(Bucket="carlas", Key=f"k{number}", Body=bytes(1000 * number))
    listed = json.loads(cluster.run("bucket", "list", "--user", "carla", "--json").stdout)
    assert [(one["bucket"], one["owners"], one["owner"]) for one in listed] == [
        ("carlas", ["carla"], owners[0]["user_id"])
    ]
    assert "carlas" in cluster.run("bucket", "list").stdout
    counted = json.loads(cluster.run("bucket", "usage", "carlas", "--json").stdout)
    assert counted == {"bucket": "carlas", "objects": 3, "versions": 3, "bytes": 3000}
    assert "3 objects, " in cluster.run("bucket", "usage", "carlas").stdout
    cluster.run("bucket", "owner", "carlas", "--user", "dario")
    assert [bucket["Name"] for bucket in clients[1].list_buckets()["Buckets"]] == ["carlas"]
    refused = cluster.run("bucket", "delete", "carlas", check=False)
    assert (refused.returncode, "not empty" in refused.stderr) == (1, True)
    for number in range(3):
        clients[1].delete_object(Bucket="carlas", Key=f"k{number}")
    cluster.run("bucket", "delete", "carlas")
    assert json.loads(cluster.run("bucket", "list", "--user", "dario", "--json").stdout) == []
    wrong = cluster.run("bucket", "create", "b1", "--user", "carla", check=False)
    assert (wrong.returncode, "3 to 63 characters" in wrong.stderr) == (1, True)


def test_the_operator_gives_an_account_users_groups_roles_policies_and_a_quota(cluster: Cluster) -> None:
    def said(*arguments: str) -> Any:
        return json.loads(cluster.run(*arguments, "--json").stdout)

    made = said("user", "add", "owner")
    root = client_of(cluster, made)
    root.create_bucket(Bucket="owners-data")
    robot = said("user", "add", "robot", "--account", "owner")
    assert robot["arn"] == f"arn:aws:iam::{made['account']}:user/robot"
    client = client_of(cluster, robot)
    assert "AccessDenied" in refusal(client)
    said("group", "add", "owner", "writers")
    said("group", "join", "owner", "writers", "robot")
    said("policy", "attach", "owner", "AmazonS3FullAccess", "--group", "writers")
    cluster.wait_until(lambda: not refusal(client), 10, "the policy of the group")
    assert [(row["GroupName"], row["Users"]) for row in said("group", "list", "owner")] == [("writers", ["robot"])]
    document = cluster.directory.parent / "policy.json"
    document.write_text(
        '{"Version": "2012-10-17", "Statement": {"Effect": "Deny", "Action": "s3:Put*", "Resource": "*"}}'
    )
    said("policy", "add", "owner", "no-writes", str(document))
    assert said("policy", "show", "owner", "no-writes") == json.loads(document.read_text())
    said("policy", "attach", "owner", "no-writes", "--user", "robot")
    refused = cluster.run("policy", "remove", "owner", "no-writes", check=False)
    assert (refused.returncode, "attached" in refused.stderr) == (1, True)
    document.write_text('{"Version": "2012-10-17", "Statement": {"Effect": "Allow"}}')
    refused = cluster.run("role", "add", "owner", "reader", str(document), check=False)
    assert (refused.returncode, "MalformedPolicyDocument" in refused.stderr) == (1, True)
    keys = said("key", "list", "owner", "--user", "robot")
    said("key", "set", "owner", keys[0]["AccessKeyId"], "--inactive", "--user", "robot")
    cluster.wait_until(lambda: "InvalidAccessKeyId" in refusal(client), 10, "the end of the key")
    assert said("user", "remove", "robot", "--account", "owner")["removed"] == "robot"
    assert said("user", "list", "--account", "owner") == []
    assert said("bucket", "quota", "owners-data", "--objects", "1") == {
        "bucket": "owners-data", "bytes": 0, "objects": 1,
    }  # fmt: skip
    assert said("user", "quota", "owner", "--bytes", "1MiB")["bytes"] == 1 << 20
    assert said("bucket", "copies", "owners-data") == {"bucket": "owners-data", "bytes": None}
    assert said("bucket", "copies", "owners-data", "--up-to", "4KiB")["bytes"] == 4096
    assert said("bucket", "copies", "owners-data") == {"bucket": "owners-data", "bytes": 4096}
    assert said("bucket", "copies", "owners-data", "--default")["bytes"] is None
    kinds = [line["kind"] for line in audit_entries(cluster)]
    assert "iam.change" in kinds
    assert "quota.set" in kinds
    assert "copies.set" in kinds


def audit_entries(cluster: Cluster) -> list[dict[str, Any]]:
    found = sorted((cluster.directory / "gateway" / "audit").glob("*"))
    lines = [line for path in found if path.is_file() for line in path.read_text().splitlines()]
    return [entry for line in lines if "kind" in (entry := json.loads(line))]


def client_of(cluster: Cluster, user: dict[str, str]) -> Any:
    import boto3

    return boto3.session.Session().client(
        "s3", endpoint_url=cluster.endpoint, region_name=cluster.settings["region"],
        aws_access_key_id=user["access_key"], aws_secret_access_key=user["secret_key"],
    )  # fmt: skip


def refusal(client: Any) -> str:
    try:
        client.list_buckets()
    except Exception as error:
        return str(error)
    return ""


def test_a_bucket_may_be_narrowed_to_countries_and_never_widened_beyond_eu_law(cluster: Cluster) -> None:
    """All disks of a trial cluster stand in France: narrowing to it holds, narrowing to Germany leaves no place, and
    the rest of the world is refused.
    """
    made = json.loads(cluster.run("bucket", "create", "only-fr", "--user", "dev", "--countries", "FR", "--json").stdout)
    racks = ["FR/lyo1/c", "FR/par1/a", "FR/par2/b"]
    assert made == {"bucket": "only-fr", "owner": "dev", "countries": ["FR"], "racks": racks}
    client = cluster.boto3()
    client.put_object(Bucket="only-fr", Key="k", Body=bytes(100_000))
    assert len(client.get_object(Bucket="only-fr", Key="k")["Body"].read()) == 100_000
    for countries, said in (("DE", "DE"), ("FR,US", "US is outside"), ("fr", "not an ISO")):
        refused = cluster.run("bucket", "create", "elsewhere", "--user", "dev", "--countries", countries, check=False)
        assert refused.returncode == 1
        assert said in refused.stderr
    narrowing = cluster.boto3()
    narrowing.meta.events.register(
        "before-call.s3.CreateBucket", lambda params, **_: params["headers"].update({"x-storaged-countries": "GB"})
    )
    with pytest.raises(ClientError) as outside:
        narrowing.create_bucket(Bucket="elsewhere")
    assert outside.value.response["Error"]["Code"] == "InvalidArgument"


def test_settings_for_clients_come_as_json_shell_and_recipes(cluster: Cluster) -> None:
    found = json.loads(cluster.run("env", "--json").stdout)
    assert set(found) == {"endpoint", "region", "access_key", "secret_key", "bucket"}
    shell = cluster.run("env").stdout
    script = (
        shell + 'echo "$AWS_ACCESS_KEY_ID|$AWS_SECRET_ACCESS_KEY|$AWS_DEFAULT_REGION|$AWS_ENDPOINT_URL|$STORAGED_DIR"'
    )
    printed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert printed.split("|") == [
        found["access_key"],
        found["secret_key"],
        found["region"],
        found["endpoint"],
        str(cluster.directory),
    ]
    for client in ("aws", "boto3", "rclone", "restic", "s3cmd"):
        recipe = cluster.run("env", "--for", client).stdout
        assert found["access_key"] in recipe
        assert found["secret_key"] in recipe


def test_health_readiness_and_metrics_answer_over_http(cluster: Cluster) -> None:
    round_trip(cluster, "metrics")
    url = admin_url(cluster)
    assert http(url + "/healthz") == (200, '{"healthy": true}')
    assert http(url + "/readyz")[0] == 200
    status, text = http(url + "/metrics")
    assert status == 200
    assert 'storaged_s3_requests_total{operation="PutObject",status="200"}' in text
    assert "storaged_ready 1.0" in text
    events = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("storaged_object_events{"))
    assert float(events['storaged_object_events{event="bytes_in"}']) > 0
    assert 'storaged_object_events{event="blocks_fallback"}' in events, "a write below its target must show"
    assert "process_resident_memory_bytes" in text
    assert http(url + "/v1/status")[0] == 404
    assert request(cluster.directory / "n1", "GET", "/readyz")["ready"] is True


def test_a_killed_rack_is_named_and_nothing_stops_until_it_is_back(cluster: Cluster) -> None:
    round_trip(cluster, "rack/before")
    pid = cluster.pids()["n2"]
    assert cluster.run("dev", "kill", "par2").stdout.strip() == f"killed n2 of {cluster.directory}"
    assert not Path(f"/proc/{pid}").exists()
    cluster.wait_until(lambda: "NODE_DOWN" in problem_codes(cluster.status()), 15, "the dead node to be noticed")
    done = cluster.run("status", "--json", check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (1, "DEGRADED")
    down = next(entry for entry in found["problems"] if entry["code"] == "NODE_DOWN")
    assert down["subject"] == "FR/par2/b/n2"
    assert node_of(found, "n2")["state"] == "down"
    assert node_of(found, "n2")["pid"] is None
    assert "storaged dev start n2" in cluster.run("status", check=False).stdout
    round_trip(cluster, "rack/during")
    assert cluster.run("dev", "start", "FR/par2/b").stdout.strip() == f"started n2 of {cluster.directory}"
    assert node_of(cluster.status(), "n2")["state"] == "up"  # a start returns when the gateway has heard of it
    assert cluster.run("repair", "status", "--wait").returncode == 0
    cluster.wait_healthy()


def test_names_of_nodes_and_racks_that_mean_nothing_or_too_much_are_refused(cluster: Cluster) -> None:
    for name, word in (("FR", "more than one"), ("n9", "no node or rack")):
        done = cluster.run("dev", "kill", name, check=False)
        assert done.returncode == 2
        assert word in done.stderr
    assert set(cluster.pids()) == {*RACKS, "gateway"}


def test_without_its_gateway_the_cluster_is_down_and_its_nodes_are_still_listed(cluster: Cluster) -> None:
    cluster.run("dev", "kill", "gateway")
    done = cluster.run("status", "--json", check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (2, "DOWN")
    assert {node["name"]: node["state"] for node in found["nodes"]} == {**dict.fromkeys(RACKS, "up"), "gateway": "down"}
    cluster.run("dev", "start", "gateway")
    cluster.wait_healthy()
    round_trip(cluster, "after-gateway")


def test_a_second_supervisor_or_node_on_the_same_directory_is_refused(cluster: Cluster) -> None:
    second = cluster.run("dev", str(cluster.directory), check=False)
    assert second.returncode == 1
    assert "already running" in second.stderr
    node = cluster.run("run", str(cluster.directory / "n1" / "config.toml"), check=False)
    assert node.returncode == 1
    assert f"in use by the process {cluster.pids()['n1']}" in node.stderr
    assert "Traceback" not in node.stderr


def test_a_port_in_use_is_named_before_anything_is_made(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("dev", str(tmp_path / "other"), "--s3-port", str(cluster.s3_port), check=False)
    assert done.returncode == 1
    assert f"127.0.0.1:{cluster.s3_port} is already in use" in done.stderr
    assert not (tmp_path / "other" / "dev.json").exists()


def test_a_reload_takes_what_can_change_and_keeps_everything_on_a_mistake(cluster: Cluster) -> None:
    path, log = cluster.directory / "n3" / "config.toml", cluster.directory / "n3" / "log"
    good, pid = path.read_text(), cluster.pids()["n3"]
    for text, word in ((good + "\n[logs]\n", "kept as it was"), (good, "configuration reloaded")):
        before = log.stat().st_size
        path.write_text(text)
        os.kill(pid, signal.SIGHUP)
        cluster.wait_until(lambda: word in log.read_text()[before:], 10, word)  # noqa: B023
    assert cluster.pids()["n3"] == pid


def test_the_audit_log_holds_and_a_changed_entry_is_named(cluster: Cluster, tmp_path: Path) -> None:
    round_trip(cluster, "audited")
    audit = cluster.directory / "gateway" / "audit"
    cluster.wait_until(
        lambda: cluster.run("audit", "verify", str(audit), check=False).returncode == 0,
        30,
        "every witness to have seen the log",
    )
    found = json.loads(cluster.run("audit", "verify", "--json", str(audit)).stdout)
    assert (found["ok"], found["compared_with_all_witnesses"], found["node"]) == (True, True, "gateway")
    storage = [name for name in cluster.pids() if name != "gateway"]
    assert {witness["name"] for witness in found["witnesses"]} == set(storage)
    copy = tmp_path / "audit"
    shutil.copytree(audit, copy)
    altered = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    altered.write_bytes(altered.read_bytes().replace(b"key.release", b"key.refusal", 1))
    done = cluster.run("audit", "verify", str(altered), check=False)
    assert done.returncode == 3
    assert altered.name in done.stderr
    assert "was altered" in done.stderr
    offline = cluster.run("audit", "verify", "--offline", str(audit))
    assert "offline" in offline.stdout


def test_every_node_is_witnessed_by_all_others(cluster: Cluster) -> None:
    for name in cluster.pids():
        audit = cluster.directory / name / "audit"
        cluster.wait_until(
            lambda audit=audit: cluster.run("audit", "verify", str(audit), check=False).returncode == 0,
            30,
            f"the witnesses of {name}",
        )
        witnesses = {path.parent.parent.name for path in cluster.directory.glob(f"*/witness/{name}.jsonl")}
        assert witnesses == {"n1", "n2", "n3"} - {name}, "storage nodes are witnesses, each of all others"


def test_doctor_warns_until_the_keys_are_backed_up_and_the_backup_brings_them_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    assert "KEYS_NOT_BACKED_UP" in cluster.run("doctor", check=False).stdout
    (tmp_path / "phrase").write_text("correct horse battery staple\n")
    cluster.run("keys", "backup", str(tmp_path / "backup"), "--passphrase-file", str(tmp_path / "phrase"))
    assert "KEYS_NOT_BACKED_UP" not in cluster.run("doctor", check=False).stdout
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o600
    round_trip(cluster, "keys/before")
    cluster.run("dev", "stop", "gateway")
    shutil.move(cluster.directory / "gateway" / "keys", tmp_path / "lost")
    cluster.run("dev", "start", "gateway")
    cluster.wait_until(
        lambda: "KEYRING_MISMATCH" in problem_codes(cluster.status()), 15, "the missing keyring to be named"
    )
    assert cluster.run("status", check=False).returncode == 2
    assert "ServiceUnavailable" in refusal(cluster.boto3())
    assert not (cluster.directory / "gateway" / "keys").exists(), "keys are never made anew"
    (tmp_path / "wrong").write_text("incorrect horse\n")
    wrong = cluster.run(
        "keys", "restore", str(tmp_path / "backup"), "--passphrase-file", str(tmp_path / "wrong"), check=False
    )
    assert (wrong.returncode, "WRONG_PASSPHRASE" in wrong.stderr) == (1, True)
    assert not (cluster.directory / "gateway" / "keys").exists()
    cluster.run("keys", "restore", str(tmp_path / "backup"), "--passphrase-file", str(tmp_path / "phrase"))
    os.kill(cluster.pids()["gateway"], signal.SIGHUP)
    cluster.wait_healthy()
    assert cluster.boto3(attempts=3).get_object(Bucket="demo", Key="keys/before")["ContentLength"] == 300_000


def test_a_wiped_disk_is_refused_and_the_rest_goes_on(cluster: Cluster) -> None:
    disk = node_of(cluster.status(), "n1")["disks"][0]
    cluster.run("dev", "stop", "n1")
    kept = Path(disk["directory"] + ".kept")
    os.rename(disk["directory"], kept)
    cluster.run("dev", "start", "n1")
    cluster.wait_until(lambda: "DISK_BLANK" in problem_codes(cluster.status()), 15, "the blank disk to be named")
    found = cluster.status()
    assert found["verdict"] == "DEGRADED"
    assert [one["state"] for one in node_of(found, "n1")["disks"] if one["id"] == disk["id"]] == ["blank"]
    assert [one["state"] for one in node_of(found, "n1")["disks"] if one["id"] != disk["id"]] == ["ok"]
    round_trip(cluster, "blank")
    cluster.run("dev", "stop", "n1")
    shutil.rmtree(disk["directory"], ignore_errors=True)
    os.rename(kept, disk["directory"])
    cluster.run("dev", "start", "n1")
    cluster.wait_healthy()


def test_an_index_is_rebuilt_offline_and_a_running_disk_is_left_alone(cluster: Cluster) -> None:
    round_trip(cluster, "indexed", 700_000)
    disk = node_of(cluster.status(), "n2")["disks"][0]["directory"]
    busy = cluster.run("fsck", disk, check=False)
    assert busy.returncode == 1
    assert "DIRECTORY_IN_USE" in busy.stderr
    cluster.run("dev", "stop", "n2")
    assert "fragments" in cluster.run("fsck", disk).stdout
    shutil.rmtree(Path(disk) / "fragments" / "index")
    assert "made anew" in cluster.run("fsck", "--rebuild-index", disk).stdout
    cluster.run("dev", "start", "n2")
    cluster.wait_healthy()


def test_everything_is_still_there_after_a_restart_and_ctrl_c_ends_all_processes(cluster: Cluster) -> None:
    client = cluster.boto3()
    bodies = {f"kept/{size}": os.urandom(size) for size in (0, 100, 9_000, 700_000)}
    for key, body in bodies.items():
        client.put_object(Bucket="demo", Key=key, Body=body, Metadata={"size": str(len(body))})
    pids = cluster.pids()
    cluster.stop()
    assert [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()] == []
    before = dict(cluster.settings)
    cluster.start()
    assert cluster.settings == before
    for key, body in bodies.items():
        answer = cluster.boto3().get_object(Bucket="demo", Key=key)
        assert answer["Body"].read() == body
        assert answer["Metadata"] == {"size": str(len(body))}


def test_a_detached_cluster_runs_until_it_is_told_to_stop(tmp_path: Path, cluster: Cluster) -> None:
    other = Cluster(tmp_path / "other", s3_port=free_port())
    ports = ["--s3-port", str(other.s3_port), "--admin-port", str(free_port())]
    done = subprocess.run(
        [STORAGED, "dev", str(other.directory), "--detach", *ports],
        env=other.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stderr
        assert "Three storage nodes with six disks in three racks" in done.stdout
        assert f"http://127.0.0.1:{other.s3_port}" in done.stdout
        pids = other.pids()
        assert len(pids) == 4
        # The certificate of another cluster: the node does not start with it, and says why.
        other.run("dev", "stop", "n1")
        os.rename(other.directory / "n1" / "identity", tmp_path / "own")
        shutil.copytree(cluster.directory / "n1" / "identity", other.directory / "n1" / "identity")
        refused = other.run("dev", "start", "n1", check=False)
        assert refused.returncode == 1
        assert "not by this cluster's administration key" in refused.stderr
    finally:
        other.run("dev", "stop", check=False)
    assert [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()] == []
    gone = other.run("status", check=False)
    assert gone.returncode == 2
    # A cluster that does not come up: the command says so, and fails.
    failed = subprocess.run(
        [STORAGED, "dev", str(other.directory), "--detach", *ports],
        env=other.environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert failed.returncode == 1
    assert "n1 did not start" in failed.stderr
    assert "Traceback" not in failed.stderr
