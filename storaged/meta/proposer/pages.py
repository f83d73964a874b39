"""Immutable pages of manifests, on a quorum of the replicas of the register that names them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from storaged.errors import DataDamaged, PageLost, ServiceUnavailable, StoragedError
from storaged.hashes import is_page, page_hash
from storaged.meta.consensus.quorums import View
from storaged.meta.messages import PageCheck, PageGet, PagePut, PageReply
from storaged.meta.names import RegisterName, Table, object_of_upload
from storaged.meta.ports import Replica
from storaged.meta.transport.calls import Answers, Calls


def owner_of(near: RegisterName) -> bytes:
    """The object's register, packed, of a page that this register's record names."""
    return (object_of_upload(near) if near.table == Table.UPLOAD else near).pack()


class RingPages:
    """Implements ``ports.PageCopies``."""

    def __init__(
        self, calls: Calls, view: Callable[[RegisterName], View], on_missed: Callable[[RegisterName], None]
    ) -> None:
        """``on_missed`` gets the register of a page that some replica did not take."""
        self._calls = calls
        self._view = view
        self._on_missed = on_missed

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        """See ``ports.Pages``."""
        page_name, owner = name or page_hash(body), owner_of(near)

        def put(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[PageReply]]:
            async def page_put(replica: Replica) -> PageReply:
                try:
                    return await replica.page_put(PagePut(disk, page_name, body, owner), timeout_s=timeout_s)
                except StoragedError:
                    self._on_missed(near)
                    raise

            return page_put

        quorum = self._view(near).quorum
        done = await self._calls.gather((quorum,), put, lambda reply: True, self._calls.deadline())
        if not quorum.met(done):
            raise ServiceUnavailable(
                "No majority of the replicas of this key has stored the manifest page. Nothing was changed. Retry."
            )
        return page_name

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        """See ``ports.Pages``."""
        calls, deadline = self._calls, self._calls.deadline()
        disks = self._view(near).quorum.disks
        order, lacking = calls.unresponsive.last(disks), 0
        answers: Answers[PageReply] = calls.answers()
        while order or answers.pending:
            if order:
                self._ask(answers, PageGet(order.pop(0), name), calls.timeout_s(deadline))
            remaining_s = calls.remaining_s(deadline)
            if remaining_s <= 0:
                break
            answer = await answers.next(min(calls.hedge_s, remaining_s) if order else remaining_s)
            if answer is None or isinstance(answer[1], StoragedError):
                continue
            body = answer[1].body
            if body is not None and is_page(body, name):
                return body
            lacking += 1
        if lacking == len(disks):
            raise PageLost("A page that the record of this key names is on none of its replicas, which all answered.")
        raise DataDamaged("A page of this object's manifest is on none of the replicas that answer.")

    def _ask(self, answers: Answers[PageReply], request: PageGet, timeout_s: float) -> None:
        answers.ask(request.disk, lambda replica: replica.page_get(request, timeout_s=timeout_s))

    async def pages_missing(self, disk: str, hashes: Sequence[bytes]) -> tuple[bytes, ...]:
        """See ``ports.PageCopies``."""
        replica = self._calls.replicas.replica(disk)
        return (await replica.page_check(PageCheck(disk, tuple(hashes)), timeout_s=self._calls.call_timeout_s)).hashes

    async def copy_page(self, near: RegisterName, name: bytes, disk: str) -> None:
        """See ``ports.PageCopies``."""
        body = await self.get_page(near, name)
        replica = self._calls.replicas.replica(disk)
        await replica.page_put(PagePut(disk, name, body, owner_of(near)), timeout_s=self._calls.call_timeout_s)
