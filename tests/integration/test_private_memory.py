"""What other processes of a gateway's user can see of its memory: nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, sys
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector
from storaged.node.process import keep_memory_private

if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # another user's process is not dumpable anyway
if "private" in sys.argv:
    keep_memory_private()
parent = os.getpid()
child = os.fork()
if not child:
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    seen = []
    for name in ("mem", "environ", "maps"):
        try:
            open(f"/proc/{parent}/{name}", "rb").close()
            seen.append(name)
        except OSError:
            pass
    print("seen", *seen, flush=True)
    os._exit(0)
os.waitpid(child, 0)
registry = CollectorRegistry()
ProcessCollector(registry=registry)
print("metrics", *sorted(family.name for family in registry.collect()))
"""
METRICS = "cpu_seconds max_fds open_fds resident_memory_bytes start_time_seconds virtual_memory_bytes"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_DUMPABLE is Linux's")
@pytest.mark.parametrize("private", [True, False])
def test_no_process_of_the_same_user_reads_a_gateways_memory_and_its_own_metrics_go_on(private: bool) -> None:
    arguments = [sys.executable, "-c", SCRIPT, *(["private"] if private else [])]
    seen, metrics = subprocess.run(
        arguments, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert metrics.split()[1:] == [f"process_{name}" for name in METRICS.split()]
    if private:
        assert seen == "seen"
    elif "environ" not in seen:
        pytest.skip("here no process may read another's memory anyway")
