"""What a connection waits for, and whether that moves. Pure: time is passed in.

A request has no timers. A connection notes each wait here, and a sweep over all connections (``connections``) asks a
few times in each time limit whether something moved since the last look.
"""

from __future__ import annotations

from storaged.s3.http.limits import Limits

WORKING, HEAD, BODY, SEND = range(4)
"""Phases: what a connection waits for. In WORKING its client owes nothing."""


class Progress:
    """The waits of one connection."""

    __slots__ = ("_amount_before", "_last_seen", "_moved_s", "_send_waited_s", "phase", "steps")

    def __init__(self) -> None:
        self.phase = WORKING
        self.steps = 0
        """Grows with each wait that begins or ends."""
        self._last_seen = (-1, 0)
        self._moved_s = 0.0
        self._send_waited_s = 0.0
        self._amount_before = 0

    def wait(self, phase: int) -> None:
        """A wait begins."""
        self.phase = phase
        self.steps += 1

    def wait_for_send(self) -> None:
        """A wait begins until the client has taken what was written. Its time is counted anew."""
        self._send_waited_s = 0.0
        self.wait(SEND)

    def work(self) -> None:
        """The wait is over."""
        self.phase = WORKING
        self.steps += 1

    def stalled(self, now_s: float, amount: int, idle_s: float) -> bool:
        """Whether nothing has moved for more than ``idle_s`` seconds. ``amount``: bytes so far that the client has sent
        of the body, or has taken of the answer."""
        seen = self.steps, amount
        if seen != self._last_seen:
            self._last_seen = seen
            self._moved_s = now_s
            return False
        return now_s - self._moved_s > idle_s

    def send_too_slow(self, waited_s: float, amount: int, limits: Limits) -> bool:
        """Counts ``waited_s`` more seconds of waiting for the client to take an answer. Waiting beyond ``send_idle_s``
        must be earned by the bytes that it takes (``rate_min_bytes_s``)."""
        if not self._send_waited_s:
            self._amount_before = amount
        self._send_waited_s += waited_s
        return self._send_waited_s > limits.send_idle_s + (amount - self._amount_before) / limits.rate_min_bytes_s
