"""One node, from its configuration to its last answer.

Theory of operation. ``run_node`` takes the node's lock, then ``Node.run`` builds the planes from the bottom up:
identity, layouts, disks, RPC, membership,
the ring's client, and by role maintenance (storage) and objects, keys and S3 (gateway). Every long-lived task lives in
one TaskGroup; the first that fails
unexpectedly ends the node. SIGTERM and SIGINT set ``stopping``: the front drains, then everything closes from the top
down. SIGHUP reads the
configuration again and applies what can change while running; a bad one is logged and the old one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog
import uvloop

from storaged import config as configuration
from storaged import observe
from storaged.admin.place import lock_directory
from storaged.clock import SystemClock
from storaged.cluster.identity import load_identity
from storaged.config import Config
from storaged.errors import CertificateRefused, StoragedError
from storaged.node.notify import Notifier
from storaged.node.planes import Node
from storaged.units import MIB

LOOP_LAG_EVERY_S = 1.0
USABLE_WAIT_S = 2.0
"""How long a further worker waits for its keyring before it takes connections: in a cluster that runs it is open by
then, and no client is told 503 by a
worker that has just been started again."""

EXIT_DEFECT = 70
"""EX_SOFTWARE of sysexits(3)."""
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
KEPT_BYTES_MAX = 32 * MIB
ARENAS_MAX = 2
DESCRIPTORS_MAX = 65_536

COLLECT_AFTER_OBJECTS = 10_000
"""New containers before the cyclic collector looks at the young ones. A request has some hundreds and drops them all by
reference counting, so that at
Python's 700 the collector walked what 64 requests in flight hold again and again, for nothing: a seventh of a gateway's
time."""

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that came back from the disk or from native work waits for the interpreter at most; Python has 5
ms. It costs no CPU that can be
measured, and the median of a lone PUT fell by a fifth on two busy cores."""

log = structlog.get_logger("node")


def run_node(path: Path, *, parent: int = 0) -> int:
    """Runs until it is told to stop, or until the process ``parent`` ends that started it; the exit code. Raises
    StoragedError for what is wrong before it runs.
    """
    if parent:
        _end_with(parent, signal.SIGTERM)
    config = _begin(path)
    observe.setup_logging(config.log.level, config.log.format, node=config.node.name)
    directory = Path(config.node.directory)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = lock_directory(directory)
    try:
        return _run(_main(config, None))
    finally:
        os.close(lock)


def run_worker(path: Path, parent: int, number: int, door: int, talk: int) -> int:
    """A further process of a gateway, under the first one's lock; ``door`` and ``talk`` are its descriptors of what
    ``node.workers`` describes.
    """
    _end_with(parent, signal.SIGKILL)
    config = _begin(path)
    observe.setup_logging(config.log.level, config.log.format, node=config.node.name, worker=str(number))
    return _run(_main(config, (number, door, talk)))


def _begin(path: Path) -> Config:
    """The configuration, and what a process of storaged is to the system."""
    config = configuration.load(path)
    os.umask(0o077)  # what lies on disks tells names and sizes: to nobody but this user, wherever the disks are mounted
    if config.gateway:
        with contextlib.suppress(
            ValueError, OSError
        ):  # a system call filter may forbid it; then the unit has set the limit
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would have the keys
        keep_memory_private()
    _keep_memory()
    _allow_connections()
    _do_not_push()
    return config


def _run(work: Coroutine[Any, Any, None]) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    except BaseExceptionGroup as group:
        _, unforeseen = group.split(StoragedError)
        if unforeseen is None:
            raise _first(group) from None
        log.error("the node ends: this is a defect of storaged", exc_info=group)
        return EXIT_DEFECT
    return 0


def _tune_interpreter() -> None:
    """What is there after the start stays: the collector need not look at it again."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 20, 20)
    gc.collect()
    gc.freeze()


def keep_memory_private() -> None:
    """No other process of this user may read this one's memory from now on, nor its environment and open files
    (PR_SET_DUMPABLE off: prctl(2), proc(5)); no core dump has it.

    What this process reads of itself for its metrics stays readable: stat, limits, and its own list of descriptors.
    Root can read everything still, and memory is not locked:
    swap must be encrypted, or off. Elsewhere (macOS) nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _keep_memory() -> None:
    """Buffers of bodies are freed and needed again within milliseconds: glibc is told not to give them back each time,
    for a fresh one costs a page fault every
    4 KiB. Fewer arenas, because what one thread frees another cannot use. Elsewhere (musl, macOS) nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (_M_MMAP_THRESHOLD, KEPT_BYTES_MAX),
            (_M_TRIM_THRESHOLD, KEPT_BYTES_MAX),
            (_M_ARENA_MAX, ARENAS_MAX),
        ):
            mallopt(option, value)


def _allow_connections() -> None:
    """Shells give 1,024 descriptors, and every connection is one; the hard limit is what the administrator meant."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _do_not_push() -> None:
    """Whoever is woken by bytes on a socket waits for its turn of the processor instead of taking it from who sent them
    (SCHED_BATCH, sched(7)): that one has mostly more to send, which is
    then read together. Its share is the same. An administrator's own choice stays; a system call filter may forbid
    this, then the unit has made it."""
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _first(group: BaseExceptionGroup[BaseException]) -> StoragedError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StoragedError)
    return error


def _end_with(parent: int, number: signal.Signals) -> None:
    """That signal when the process that started us ends, however it ends (prctl(2)). It says its pid: it may have ended
    before this, and may rightly be 1.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"process {parent}, which started this one, has ended")


async def _main(config: Config, worker: tuple[int, int, int] | None) -> None:
    """``worker``: number, door and talk of a further process of a gateway."""
    own = load_identity(Path(config.cluster.identity))
    _check_identity(config, own.name, own.peer.roles)
    observe.setup_spans(config.node.name)
    notifier = Notifier()
    stopping, reloading = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reloading.set)
    leader = None
    if worker is not None:
        from storaged.node.leader import Leader

        leader = Leader(*worker)
        await leader.open()
    node = Node(config, own, SystemClock(), leader)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(notifier.close)
        await node.open(stack)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in node.work()]
            tasks.append(group.create_task(notifier.feed_watchdog()))
            tasks.append(group.create_task(_measure_lag(node.metrics)))
            tasks.append(group.create_task(_reload_when_asked(node, reloading, notifier)))
            if leader is not None:
                tasks.append(group.create_task(leader.serve(node, reloading, stopping)))
                if node.gateway is not None:
                    await node.gateway.usable(USABLE_WAIT_S)
                leader.ready()
            notifier.ready(f"{', '.join(config.node.roles)} of cluster {own.cluster}")
            log.info(
                "ready",
                roles=",".join(config.node.roles),
                cluster=own.cluster,
                disks=len(config.disks),
                pid=os.getpid(),
            )
            _tune_interpreter()
            await stopping.wait()
            notifier.stopping()
            log.info("stopping; requests in flight are finished first")
            await node.drain()
            for task in tasks:
                task.cancel()
    log.info("stopped")


def _check_identity(config: Config, name: str, roles: tuple[str, ...]) -> None:
    if name != config.node.name:
        raise CertificateRefused(
            f"the certificate in {config.cluster.identity} is that of {name!r}; this node is {config.node.name!r}"
        )
    if beyond := sorted(set(config.node.roles) - set(roles)):
        raise CertificateRefused(
            f"the certificate of {name!r} does not give the role {', '.join(beyond)}; it gives: {', '.join(roles)}"
        )


async def _measure_lag(metrics: observe.Metrics) -> None:
    gauge = metrics.gauge("storaged_loop_lag_seconds")
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(LOOP_LAG_EVERY_S)
        gauge.set(max(0.0, loop.time() - before - LOOP_LAG_EVERY_S))


async def _reload_when_asked(node: Node, reloading: asyncio.Event, notifier: Notifier) -> None:
    while True:
        await reloading.wait()
        reloading.clear()
        notifier.reloading()
        try:
            found = configuration.load(node.config.path)
            await node.reload(found)
            log.info("configuration reloaded", file=found.path)
        except StoragedError as error:
            log.error("the configuration is kept as it was", code=error.code, reason=error.message)
        notifier.ready("running")
