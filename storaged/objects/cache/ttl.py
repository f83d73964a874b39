"""Values kept for a moment: one load at a time for each key, bounded, expiring. What is in use is loaded anew before it
expires, so that nobody waits for it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, Generic, TypeVar

import structlog

from storaged.clock import Clock
from storaged.errors import S3Error

RENEWED_AFTER = 0.6
"""Of the time that a value is kept: who asks for it then has it loaded anew, and gets what there is."""

log = structlog.get_logger(__name__)

RENEWALS_MAX = 32
"""At a time; for more the next who finds one expired waits, as for one that was not in use."""

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values, none of them None. What was loaded in the last ``seconds``; a change elsewhere is seen after that, one of
    this process at once (``forget``). Failures are not kept.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: float,
        entries_max: int,
        load: Callable[[K], Coroutine[Any, Any, V]],
        spawn: Callable[[Coroutine[Any, Any, None]], bool],
    ) -> None:
        """``spawn`` runs what nobody waits for, or says that it does not."""
        self._clock = clock
        self._load_of = load
        self._spawn = spawn
        self._seconds = seconds
        self._fresh_s = seconds * RENEWED_AFTER
        self._entries_max = entries_max
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        """With the time of its loading."""
        self._loads: dict[K, asyncio.Future[V]] = {}
        self._renewing: set[K] = set()

    def try_get(self, key: K) -> V | None:
        """What ``get`` would return without waiting; None when it would load."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        age_s = self._clock.monotonic() - kept[0]
        if age_s < self._fresh_s:
            return kept[1]
        if age_s >= self._seconds:
            return None
        if key not in self._renewing and len(self._renewing) < RENEWALS_MAX:
            self._renewing.add(key)
            if not self._spawn(self._renew(key)):
                self._renewing.discard(key)
        return kept[1]

    async def get(self, key: K) -> V:
        """Raises what ``load`` raises."""
        if (kept := self.try_get(key)) is not None:
            return kept
        while (under_way := self._loads.get(key)) is not None:
            try:
                return await asyncio.shield(under_way)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not under_way.cancelled() or (task is not None and task.cancelling()):
                    raise  # it is the caller that was cancelled, be it along with the one that loads
        return await self._load(key)

    async def _renew(self, key: K) -> None:
        try:
            if key not in self._loads:
                await self._load(key)
        except Exception as error:  # whoever finds it expired meets it again
            if isinstance(error, S3Error) and error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                self.forget(key)  # it is not there any more
            log.debug("a value in use could not be loaded anew", error=repr(error))
        finally:
            self._renewing.discard(key)

    async def _load(self, key: K) -> V:
        result: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._loads[key] = result
        try:
            value = await self._load_of(key)
        except Exception as error:
            result.set_exception(error)
            result.exception()  # seen: nobody else may be waiting
            raise
        except BaseException:
            result.cancel()
            raise
        else:
            result.set_result(value)
            if self._loads.get(key) is result:
                self._keep(key, value)
            return value
        finally:
            if self._loads.get(key) is result:
                del self._loads[key]

    def _keep(self, key: K, value: V) -> None:
        self._kept[key] = (self._clock.monotonic(), value)
        self._kept.move_to_end(key)
        while len(self._kept) > self._entries_max:
            self._kept.popitem(last=False)

    def forget_where(self, doubtful: Callable[[V], bool]) -> None:
        """Every value that is. What is being loaded now is kept."""
        for key in [key for key, (_, value) in self._kept.items() if doubtful(value)]:
            del self._kept[key]

    def forget(self, key: K) -> None:
        """Also what is being loaded now is not kept: it may be from before the change."""
        self._kept.pop(key, None)
        self._loads.pop(key, None)
