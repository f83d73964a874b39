"""Deadlines of changes and reads: one timer; what has arrived while the process did not run is read first."""

from __future__ import annotations

from storaged.deadlines import Deadlines
from tests.sim.virtual import VirtualLoop

LIMIT_S = 0.05


class Waiter:
    def __init__(self) -> None:
        self.rung = 0

    def on_time(self) -> None:
        self.rung += 1


def run(late_s: float, answered_at: float | None) -> int:
    """How often a deadline rang. The process does not run for ``late_s``; the answer arrives at ``answered_at``."""
    loop, deadlines, waiter = VirtualLoop(), Deadlines(), Waiter()

    async def main() -> None:
        deadlines.begin(waiter, LIMIT_S)
        if answered_at is not None:
            loop.call_at(answered_at, deadlines.end, waiter)
        loop.advance(late_s)
        over = loop.create_future()
        loop.call_at(loop.time() + 10 * LIMIT_S, over.set_result, None)
        await over

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return waiter.rung


def test_a_deadline_rings_when_no_answer_came_in_time() -> None:
    assert run(0.0, None) == 1
    assert run(0.0, 2 * LIMIT_S) == 1
    assert run(0.0, LIMIT_S / 2) == 0


def test_a_process_that_did_not_run_reads_what_has_arrived_first() -> None:
    assert run(10 * LIMIT_S, 9 * LIMIT_S) == 0


def test_it_rings_also_when_the_process_did_not_run_and_nothing_has_arrived() -> None:
    assert run(10 * LIMIT_S, None) == 1


def test_a_mistake_at_one_deadline_keeps_no_other_from_ringing() -> None:
    class Mistaken(Waiter):
        def on_time(self) -> None:
            raise ZeroDivisionError

    loop, deadlines, same, later = VirtualLoop(), Deadlines(), Waiter(), Waiter()

    async def main() -> None:
        for waiter, limit_s in ((Mistaken(), LIMIT_S), (same, LIMIT_S), (later, 2 * LIMIT_S)):
            deadlines.begin(waiter, limit_s)
        over = loop.create_future()
        loop.call_at(loop.time() + 3 * LIMIT_S, over.set_result, None)
        await over

    try:
        loop.set_exception_handler(lambda _loop, _context: None)
        loop.run_until_complete(main())
    finally:
        loop.close()
    assert (same.rung, later.rung) == (1, 1)
