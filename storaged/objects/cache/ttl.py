"""A cache whose values expire: bounded, with one load at a time for each key. Values in use are reloaded before they
expire, so that no request waits for them.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, Generic, TypeVar

import structlog

from storaged.clock import Clock
from storaged.errors import S3Error

REFRESH_AFTER = 0.6
"""Share of a value's lifetime. A request after it gets the cached value and starts a reload."""

log = structlog.get_logger(__name__)

REFRESHES_MAX = 32
"""At a time. Beyond it, the first request after a value's expiry waits for the load."""

K = TypeVar("K")
V = TypeVar("V")


class TtlCache(Generic[K, V]):
    """Values, none of them None, that were loaded in the last ``seconds``. A change elsewhere is seen after that, a
    change by this process at once (``forget``). Failures are not cached.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: float,
        entries_max: int,
        load: Callable[[K], Coroutine[Any, Any, V]],
        spawn: Callable[[Coroutine[Any, Any, None]], bool],
        made_s: Callable[[V], float] | None = None,
    ) -> None:
        """``spawn`` runs a coroutine in the background, or returns False when it does not. ``made_s``: for a value that
        was made from values in other caches, when the oldest of these was loaded (their ``loaded_s``). The value
        expires together with that one. Otherwise a change could be seen as late as all these lifetimes added up.
        """
        self._clock = clock
        self._load_of = load
        self._spawn = spawn
        self._made_s = made_s
        self._seconds = seconds
        self._fresh_s = seconds * REFRESH_AFTER
        self._entries_max = entries_max
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()
        """With the time of the load."""
        self._loads: dict[K, asyncio.Future[V]] = {}
        self._refreshing: set[K] = set()

    def try_get(self, key: K) -> V | None:
        """What ``get`` would return without waiting; None when it would load."""
        cached = self._entries.get(key)
        if cached is None:
            return None
        age_s = self._clock.monotonic() - cached[0]
        if age_s < self._fresh_s:
            return cached[1]
        if age_s >= self._seconds:
            return None
        if key not in self._refreshing and len(self._refreshing) < REFRESHES_MAX:
            self._refreshing.add(key)
            if not self._spawn(self._refresh(key)):
                self._refreshing.discard(key)
        return cached[1]

    def loaded_s(self, key: K) -> float:
        """When the cached value was loaded; long ago when there is none."""
        cached = self._entries.get(key)
        return -math.inf if cached is None else cached[0]

    async def get(self, key: K) -> V:
        """Raises the errors of ``load``."""
        if (cached := self.try_get(key)) is not None:
            return cached
        while (under_way := self._loads.get(key)) is not None:
            try:
                return await asyncio.shield(under_way)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not under_way.cancelled() or (task is not None and task.cancelling()):
                    raise  # the caller was cancelled, perhaps together with the task that loads
        return await self._load(key)

    async def _refresh(self, key: K) -> None:
        try:
            if key not in self._loads:
                await self._load(key)
        except Exception as error:  # the next request after the expiry gets the error
            if isinstance(error, S3Error) and error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                self.forget(key)  # it does not exist any more
            log.debug("a value in use could not be loaded anew", error=repr(error))
        finally:
            self._refreshing.discard(key)

    async def _load(self, key: K) -> V:
        result: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._loads[key] = result
        try:
            value = await self._load_of(key)
        except Exception as error:
            result.set_exception(error)
            result.exception()  # mark as retrieved: perhaps no other request waits for it
            raise
        except BaseException:
            result.cancel()
            raise
        else:
            result.set_result(value)
            if self._loads.get(key) is result:
                self._put(key, value)
            return value
        finally:
            if self._loads.get(key) is result:
                del self._loads[key]

    def _put(self, key: K, value: V) -> None:
        now_s = self._clock.monotonic()
        self._entries[key] = (now_s if self._made_s is None else min(now_s, self._made_s(value)), value)
        self._entries.move_to_end(key)
        while len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)

    def forget_where(self, doubtful: Callable[[V], bool]) -> None:
        """Drops every value that is ``doubtful``. A load that is under way is still cached."""
        for key in [key for key, (_, value) in self._entries.items() if doubtful(value)]:
            del self._entries[key]

    def forget_loads(self) -> None:
        """No load that is under way is cached: it may be from before a change."""
        self._loads.clear()

    def forget(self, key: K) -> None:
        """A load that is under way is not cached either, since it may be from before the change."""
        self._entries.pop(key, None)
        self._loads.pop(key, None)
