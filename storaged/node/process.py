"""How a process of storaged is set up: memory, descriptors, scheduling, interpreter, and the end with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys

from storaged.units import MIB

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
KEPT_BYTES_MAX = 32 * MIB
ARENAS_MAX = 2
DESCRIPTORS_MAX = 65_536

COLLECT_AFTER_OBJECTS = 10_000
"""New containers before the cyclic collector looks at the young ones.

A request has some hundreds, and reference counting frees them all. With Python's default of 700 the collector walked
the objects of 64 requests in flight again and again for nothing: a seventh of a gateway's time.
"""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that returns from the disk or from native code waits for the interpreter at most.

Python's default is 5 ms. This costs no measurable CPU; the median of a lone PUT fell by a fifth on two busy cores.
"""


def tune_interpreter() -> None:
    """Freezes the objects of the start: they stay, so the collector need not look at them again."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 20, 20)
    gc.collect()
    gc.freeze()


def keep_memory_private() -> None:
    """Hides this process's memory, environment and open files from other processes of the same user.

    It switches PR_SET_DUMPABLE off (prctl(2), proc(5)), so no core dump has them either. The process still reads what
    its metrics need: stat, limits, its own list of descriptors. Root can still read everything, and memory is not
    locked: swap must be encrypted or off. Does nothing where there is no prctl (macOS).
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def keep_memory() -> None:
    """Makes glibc keep freed memory: buffers of bodies are needed again within milliseconds.

    A fresh buffer costs a page fault every 4 KiB. There are few arenas, as a thread can't use what another has freed.
    Does nothing on other C libraries (musl, macOS).
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (_M_MMAP_THRESHOLD, KEPT_BYTES_MAX),
            (_M_TRIM_THRESHOLD, KEPT_BYTES_MAX),
            (_M_ARENA_MAX, ARENAS_MAX),
        ):
            mallopt(option, value)


def allow_connections() -> None:
    """Raises the soft limit of descriptors towards the hard one: every connection takes one, and shells allow 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def wake_gently() -> None:
    """Lets the sender of bytes finish its turn of the processor before this process wakes (SCHED_BATCH, sched(7)).

    The sender mostly has more to send, and this process then reads it all at once. Its share of the processor is the
    same. An administrator's own choice of policy stays. A system call filter may forbid the call; the unit sets the
    policy then.
    """
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def end_with(parent: int, number: signal.Signals) -> None:
    """Sends ``number`` to this process when its parent ends, however that ends (prctl(2)).

    ``parent`` is the parent's pid, which may be 1. Exits at once when the parent has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this one, has ended")
