"""A gateway of three processes on one port: what an operator, a client and a killer of processes see."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.cluster import Cluster
from tests.patience import GUARD_S
from tests.s3.test_bad_input import in_flight
from tests.s3.test_dev_cluster import descriptors_of

WORKERS = 3


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(Path(tmp_path_factory.mktemp("workers")) / "s3", workers=WORKERS)
    try:
        yield found.start()
    finally:
        found.stop()


def processes(cluster: Cluster) -> list[int]:
    return [cluster.pids()["gateway"], *cluster.further_workers()]


def connections_of(pid: int, port: int) -> int:
    """Established connections of clients that the process has open, by the kernel's tables."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == port and fields[3] == "01":
            inodes.add(f"socket:[{fields[9]}]")
    found = 0
    for descriptor in descriptors_of(pid):
        try:
            found += os.readlink(descriptor) in inodes
        except OSError:
            continue
    return found


def metrics(cluster: Cluster) -> str:
    port = json.loads((cluster.directory / "dev.json").read_text())["admin_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        told: str = answer.read().decode()
    return told


def metric(cluster: Cluster, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} (\S+)$", metrics(cluster), re.MULTILINE)
    return float(found[1]) if found else 0.0


def asking(cluster: Cluster) -> http.client.HTTPConnection:
    """A connection that has had an answer (a refusal: it is not signed) and stays open."""
    connection = http.client.HTTPConnection("127.0.0.1", cluster.s3_port, timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().read()
    return connection


def serving(cluster: Cluster) -> bool:
    return metric(cluster, "storaged_workers") == WORKERS


def test_connections_are_handed_out_in_turn_and_what_all_count_is_one_nodes(several: Cluster) -> None:
    pids = processes(several)
    assert len(pids) == WORKERS
    refused = 'storaged_s3_requests_total{operation="ListBuckets",status="403"}'
    before = metric(several, refused)
    open_connections = [asking(several) for _ in range(9)]
    assert [connections_of(pid, several.s3_port) for pid in pids] == [3, 3, 3]
    assert metric(several, refused) == before + 9
    assert metric(several, "storaged_s3_connections") == 9
    for connection in open_connections:
        connection.close()


def test_what_one_process_wrote_every_other_reads(several: Cluster) -> None:
    clients = [several.boto3(connections=1) for _ in range(2 * WORKERS)]
    for number, client in enumerate(clients):
        client.put_object(Bucket="demo", Key=f"by-{number}", Body=b"%d" % number * 5000)
        for other in clients:
            assert other.get_object(Bucket="demo", Key=f"by-{number}")["Body"].read() == b"%d" % number * 5000
    clients[0].create_bucket(Bucket="by-one-process")
    for client in clients:
        client.head_bucket(Bucket="by-one-process")


def test_a_deleted_bucket_and_a_removed_user_are_gone_in_every_process_at_once(several: Cluster) -> None:
    user = json.loads(several.run("user", "add", "short-lived", "--json").stdout)
    clients = [several.boto3(connections=1) for _ in range(WORKERS)]
    others = [several.boto3(connections=1, keys=(user["access_key"], user["secret_key"])) for _ in range(WORKERS)]
    for number in range(WORKERS):
        clients[number].create_bucket(Bucket="short-lived")
        for client in clients:
            client.list_objects_v2(Bucket="short-lived")
        clients[number].delete_bucket(Bucket="short-lived")
        for client in clients:
            with pytest.raises(ClientError, match="NoSuchBucket"):
                client.list_objects_v2(Bucket="short-lived")
    for other in others:
        other.list_buckets()
    several.run("user", "remove", "short-lived")
    for other in others:
        with pytest.raises(ClientError, match="InvalidAccessKeyId"):
            other.list_buckets()


def test_equal_completes_through_different_processes_all_get_the_same_answer(several: Cluster) -> None:
    clients = [several.boto3() for _ in range(16)]
    clients[0].create_bucket(Bucket="completes")
    for turn in range(3):
        ids = {"Bucket": "completes", "Key": f"k{turn}"}
        ids["UploadId"] = clients[0].create_multipart_upload(**ids)["UploadId"]
        parts = [{"PartNumber": 1, "ETag": clients[0].upload_part(**ids, PartNumber=1, Body=b"x" * 70_000)["ETag"]}]
        request = {**ids, "MultipartUpload": {"Parts": parts}}
        with ThreadPoolExecutor(len(clients)) as pool:
            answers = [pool.submit(client.complete_multipart_upload, **request) for client in clients]
            found = [answer.result()["ETag"] for answer in answers]
        assert len(set(found)) == 1
        assert clients[0].get_object(Bucket="completes", Key=f"k{turn}")["ETag"] == found[0]


def test_a_killed_process_comes_back_and_what_it_counted_stays(several: Cluster) -> None:
    asked = 'storaged_s3_requests_total{operation="ListBuckets",status="403"}'
    before, restarts = metric(several, asked), metric(several, "storaged_worker_restarts_total")
    victim = processes(several)[1]
    os.kill(victim, signal.SIGKILL)
    for _ in range(30):
        asking(several).close()
    several.wait_until(lambda: serving(several), 30, "all workers serving again")
    assert victim not in processes(several)
    assert len(processes(several)) == WORKERS
    assert metric(several, "storaged_worker_restarts_total") == restarts + 1
    assert metric(several, asked) >= before + 30
    assert "workers" in several.run("doctor", check=False).stdout
    assert several.status()["verdict"] == "HEALTHY"
    several.boto3(attempts=1).list_buckets()


def test_a_reload_reaches_every_process_and_the_audit_log_is_one(several: Cluster) -> None:
    first = several.pids()["gateway"]
    log = several.directory / "gateway" / "log"
    already = log.read_text().count("configuration reloaded")
    os.kill(first, signal.SIGHUP)
    several.wait_until(
        lambda: log.read_text().count("configuration reloaded") == already + WORKERS, 10, "a reload of all"
    )
    lines = log.read_text().splitlines()
    assert any("configuration reloaded" in line and "worker=2" in line for line in lines)
    for client in [several.boto3(connections=1) for _ in range(WORKERS)]:
        client.put_object(Bucket="demo", Key="audited", Body=b"x")
    audit = several.directory / "gateway" / "audit"
    released = sum(path.read_bytes().count(b'"kind":"key.release"') for path in audit.iterdir())
    assert released >= WORKERS  # each process is given the bucket's key for itself
    assert "every entry follows" in several.run("audit", "verify", str(audit)).stdout


def put_in_halves(cluster: Cluster, number: int, rest: threading.Event) -> int:
    """The status of an upload whose second half comes when ``rest`` is set; 0 when the connection broke."""
    client = cluster.boto3()
    url = client.generate_presigned_url("put_object", Params={"Bucket": "demo", "Key": f"slow-{number}"})
    path = url.split(str(cluster.s3_port), 1)[1]
    with socket.create_connection(("127.0.0.1", cluster.s3_port)) as connection:
        head = f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1:{cluster.s3_port}\r\nContent-Length: 10\r\n\r\n12345"
        connection.sendall(head.encode())
        assert rest.wait(GUARD_S)
        try:
            connection.sendall(b"67890")
            with connection.makefile("rb") as answer:
                return int(answer.readline().split()[1])
        except (ConnectionError, IndexError):
            return 0


def uploads_in_all(cluster: Cluster, threads: ThreadPoolExecutor, number: int) -> tuple[list[Any], threading.Event]:
    """So many uploads under way, in turn in each process, and what lets them go on."""
    rest = threading.Event()
    uploads = [threads.submit(put_in_halves, cluster, each, rest) for each in range(number)]
    cluster.wait_until(lambda: in_flight(cluster) == number, 10, "uploads under way")
    return uploads, rest


def test_a_killed_process_costs_its_own_requests_and_no_others(several: Cluster) -> None:
    with ThreadPoolExecutor(2 * WORKERS) as threads:
        uploads, rest = uploads_in_all(several, threads, 2 * WORKERS)
        killed = processes(several)[1]
        os.kill(killed, signal.SIGKILL)
        several.wait_until(lambda: not alive(killed), 10, "the end of the process")
        rest.set()
        assert sorted(upload.result() for upload in uploads) == [0] * 2 + [200] * 2 * (WORKERS - 1)
    several.wait_until(lambda: serving(several), 30, "all workers serving again")


@pytest.mark.parametrize("everybody", [False, True])
def test_stopping_lets_every_process_finish_its_requests(several: Cluster, everybody: bool) -> None:
    """systemd tells all processes of a unit to end, and all at once."""
    pids = processes(several)
    with ThreadPoolExecutor(2 * WORKERS) as threads:
        uploads, rest = uploads_in_all(several, threads, 2 * WORKERS)
        if everybody:
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            rest.set()
        else:
            threading.Timer(1.5, rest.set).start()  # the command returns when all requests are finished
            several.run("dev", "stop", "gateway")
        assert [upload.result() for upload in uploads] == [200] * 2 * WORKERS
    several.wait_until(lambda: not [pid for pid in pids if alive(pid)], 10, "the end of all processes")
    several.run("dev", "start", "gateway")
    several.wait_healthy()
    assert several.boto3(attempts=3).get_object(Bucket="demo", Key="slow-0")["Body"].read() == b"1234567890"


def test_no_process_outlives_the_first_and_the_gateway_starts_again_at_once(several: Cluster) -> None:
    pids = processes(several)
    os.kill(pids[0], signal.SIGKILL)
    several.wait_until(lambda: not [pid for pid in pids if alive(pid)], 5, "the end of all workers")
    several.run("dev", "start", "gateway")
    several.wait_healthy()
    assert serving(several)
    assert len(processes(several)) == WORKERS


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class Receiver:
    """A webhook on loopback, which takes nothing until it is ``well``."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, str]] = []
        """(key, event, sequencer)."""
        self.well = False
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for record in json.loads(body).get("Records", ()) if receiver.well else ():
                    thing = record["s3"]["object"]
                    receiver.got.append((thing["key"], record["eventName"], thing["sequencer"]))
                self.send_response(200 if receiver.well else 503)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.slow
def test_events_of_processes_that_were_killed_arrive_in_order(several: Cluster) -> None:
    """Also a website, since the gateway has to be configured for both."""
    receiver = Receiver()
    file = several.directory / "gateway" / "config.toml"
    several.run("dev", "stop", "gateway")
    url = f"http://127.0.0.1:{receiver.server.server_address[1]}/"
    text = file.read_text().replace("[s3]\n", '[s3]\nwebsite_domain = "web.example.eu"\n')
    file.write_text(f'{text}\n[[notifications]]\nname = "hook"\nurl = "{url}"\n')
    several.run("dev", "start", "gateway")
    several.wait_healthy()
    clients = [several.boto3(connections=1) for _ in range(WORKERS)]
    client = clients[0]
    client.create_bucket(Bucket="eventful")
    rule = {"QueueArn": "arn:storaged:sqs::hook:webhook", "Events": ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]}
    put = client.put_bucket_notification_configuration
    with pytest.raises(ClientError):
        put(Bucket="eventful", NotificationConfiguration={"QueueConfigurations": [rule]})
    put(
        Bucket="eventful",
        NotificationConfiguration={"QueueConfigurations": [rule]},
        SkipDestinationValidation=True,
    )
    time.sleep(1.5)  # every process knows it
    for number in range(3):
        for index, each in enumerate(clients):
            each.put_object(Bucket="eventful", Key=f"key {index}", Body=b"%d" % number)
    client.delete_object(Bucket="eventful", Key="key 0")
    for pid in processes(several):
        os.kill(pid, signal.SIGKILL)
    receiver.well = True
    several.run("dev", "start", "gateway")
    several.wait_healthy()
    wanted = {(f"key+{index}", "ObjectCreated:Put") for index in range(WORKERS)} | {("key+0", "ObjectRemoved:Delete")}
    several.wait_until(
        lambda: wanted <= {one[:2] for one in receiver.got} and len(set(receiver.got)) == 10, 120, "all events"
    )
    for index in range(WORKERS):
        found = list(dict.fromkeys(one[2] for one in receiver.got if one[0] == f"key+{index}"))
        assert found == sorted(found)
    receiver.server.shutdown()
    asked = http.client.HTTPConnection("127.0.0.1", several.s3_port, timeout=60)
    asked.request("GET", "/", headers={"Host": "eventful.web.example.eu"})
    answer = asked.getresponse()
    assert answer.status == 404
    assert b"<li>Code: NoSuchWebsiteConfiguration</li>" in answer.read()
