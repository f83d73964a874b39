"""The process of a node: from its configuration to its last answer.

Theory of operation. ``run_node`` takes the node's lock. ``Node.open`` builds the planes from the bottom up: layouts,
disks, RPC, membership, the ring's client, and by role maintenance (storage) and objects, keys and S3 (gateway). Every
long-lived task lives in one TaskGroup; the first that fails unexpectedly ends the node. SIGTERM and SIGINT set
``stopping``: the front drains, then everything closes from the top down. SIGHUP reads the configuration again and
applies what can change at run time; a bad configuration is logged and the old one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
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
from storaged.durable import make_directory
from storaged.errors import CertificateRefused, StoragedError
from storaged.node.disks import Disks
from storaged.node.fault_note import note_faults
from storaged.node.node import Node
from storaged.node.notify import Notifier
from storaged.node.process import (
    allow_connections,
    end_with,
    keep_memory,
    keep_memory_private,
    tune_interpreter,
    wake_gently,
)

LOOP_LAG_EVERY_S = 1.0
WAITS_EVERY_S = 0.5
USABLE_WAIT_S = 2.0
"""How long a further worker waits for its keyring before it accepts connections.

In a running cluster the keyring is open by then, so that a restarted worker answers no client with 503.
"""

EXIT_DEFECT = 70
"""EX_SOFTWARE of sysexits(3)."""
log = structlog.get_logger("node")


def run_node(path: Path, *, parent: int = 0) -> int:
    """Runs a node until a signal stops it, or its ``parent`` process ends (0: none). Returns the exit code.

    Raises StoragedError for what is wrong before the node runs.
    """
    if parent:
        end_with(parent, signal.SIGTERM)
    config = _begin(path)
    observe.setup_logging(config.log.level, config.log.format, node=config.node.name)
    directory = Path(config.node.directory)
    make_directory(directory, 0o700)
    lock = lock_directory(directory)
    if config.storage:
        note_faults(directory)
    try:
        return _run(_main(config, None))
    finally:
        os.close(lock)


def run_worker(path: Path, parent: int, number: int, door: int, talk: int) -> int:
    """Runs a further process of a gateway, under the lock of the first. ``door`` and ``talk``: see ``node.workers``."""
    end_with(parent, signal.SIGKILL)
    config = _begin(path)
    observe.setup_logging(config.log.level, config.log.format, node=config.node.name, worker=str(number))
    return _run(_main(config, (number, door, talk)))


def _begin(path: Path) -> Config:
    """Loads the configuration and sets the process up."""
    config = configuration.load(path)
    os.umask(0o077)  # files on disks tell names and sizes: only this user may read them
    if config.gateway:
        # A system call filter may forbid this; the unit has set the limit then.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would have the keys
        keep_memory_private()
    keep_memory()
    allow_connections()
    wake_gently()
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


def _first(group: BaseExceptionGroup[BaseException]) -> StoragedError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StoragedError)
    return error


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
        from storaged.node.leader import Leader  # only further workers of a gateway need it

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
                assert node.gateway is not None
                serving = leader.serve(node.metrics.registry, node.gateway.forget, reloading, stopping)
                tasks.append(group.create_task(serving))
                await node.gateway.usable(USABLE_WAIT_S)
                leader.ready()
            ready = f"{', '.join(config.node.roles)} of cluster {own.cluster}"
            notifier.ready(ready)
            tasks.append(group.create_task(tell_waits(node.disks, notifier, ready)))
            log.info(
                "ready",
                roles=",".join(config.node.roles),
                cluster=own.cluster,
                disks=len(config.disks),
                pid=os.getpid(),
            )
            tune_interpreter()
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


async def tell_waits(disks: Disks, notifier: Notifier, ready: str) -> None:
    """Tells the service manager what disks wait for, and ``ready`` when none waits any more. Until it is cancelled."""
    shown = ""
    while True:
        waits = disks.waits()
        if waits != shown:
            notifier.status(waits or ready)
            shown = waits
        await asyncio.sleep(WAITS_EVERY_S)


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
