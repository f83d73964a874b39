"""Values kept for a moment: one load at a time for each key, bounded, expiring."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from storaged.clock import Clock

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values, none of them None. What was loaded in the last ``seconds``; a change elsewhere is seen after that, one of this process at once (``forget``). Failures are not kept."""

    def __init__(self, clock: Clock, seconds: float, entries_max: int) -> None:
        self._clock = clock
        self._seconds = seconds
        self._entries_max = entries_max
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._loads: dict[K, asyncio.Future[V]] = {}

    def at_hand(self, key: K) -> V | None:
        """What ``get`` would return without waiting; None when it would load."""
        kept = self._kept.get(key)
        return kept[1] if kept is not None and self._clock.monotonic() < kept[0] else None

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """Raises what ``load`` raises."""
        if (kept := self.at_hand(key)) is not None:
            return kept
        while (under_way := self._loads.get(key)) is not None:
            try:
                return await asyncio.shield(under_way)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not under_way.cancelled() or (task is not None and task.cancelling()):
                    raise  # it is the caller that was cancelled, be it along with the one that loads
        return await self._load(key, load)

    async def _load(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        result: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._loads[key] = result
        try:
            value = await load()
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
        self._kept[key] = (self._clock.monotonic() + self._seconds, value)
        self._kept.move_to_end(key)
        while len(self._kept) > self._entries_max:
            self._kept.popitem(last=False)

    def forget(self, key: K) -> None:
        """Also what is being loaded now is not kept: it may be from before the change."""
        self._kept.pop(key, None)
        self._loads.pop(key, None)
