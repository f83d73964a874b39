"""Types are decoded for the first time by several threads at once, in a process of their own, for it may be killed."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, threading
import msgspec
from storaged.wire import decode, encode

sys.setswitchinterval(1e-6)
for number in range(100):
    fields = [(f"f{place}", int | str | None) for place in range(40)]
    inner = msgspec.defstruct(f"Inner{number}", fields, array_like=True, frozen=True)
    whole = [("a", inner), ("b", tuple[inner, ...]), ("c", dict[str, inner])]
    outer = msgspec.defstruct(f"Outer{number}", whole, array_like=True, frozen=True)
    one = inner(*range(40))
    sent = outer(one, (one, one), {"x": one})
    data, barrier, wrong = encode(sent), threading.Barrier(6), []

    def decode_once():
        barrier.wait()
        if decode(data, outer) != sent:
            wrong.append(number)

    threads = [threading.Thread(target=decode_once) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
"""


def test_threads_that_decode_a_type_for_the_first_time_do_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
