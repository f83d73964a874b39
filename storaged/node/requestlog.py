"""The log lines and metrics of S3 requests: counters always; access log and log of slow requests as configured.

The logger is ``s3``. Each line is one answered request.

    answered   at level info with ``[log] access = true``, else at debug
    slow       at warning: it took longer than ``[log] slow_ms`` and the time that its bytes may take
    failed     at warning, always: the store's own failures (5xx other than NotImplemented)

No line has a key, a secret, a signature or content. Names of buckets and objects are in ``target``.
"""

from __future__ import annotations

import logging

import structlog

from storaged import observe
from storaged.cluster.audit.trail import Trail
from storaged.config import LogSection
from storaged.observe import Metrics
from storaged.s3.request import RequestDone
from storaged.units import MIB

SLOW_BYTES_PER_S = 4 * MIB
"""The slowest pace that a client may have: a request may take a second more for each SLOW_BYTES_PER_S bytes. So a 5 GiB
upload is not slow.
"""


class RequestLog:
    """Called with every answered request, on the event loop. One a process."""

    def __init__(self, metrics: Metrics, settings: LogSection, trail: Trail | None = None) -> None:
        """``trail``: the audit log, which counts refusals of access."""
        self._tallies = metrics.requests
        self._log = structlog.get_logger("s3")
        self._level = logging.getLogger("storaged.s3")
        self._trail = trail
        self._record = observe.span_recorder("storaged.s3")
        self.configure(settings)

    def configure(self, settings: LogSection) -> None:
        """Takes over the configuration, also at a reload."""
        self._access = settings.access
        self._slow_s = settings.slow_ms / 1000

    def __call__(self, done: RequestDone) -> None:
        status, tallies = done.reply.status, self._tallies
        tallies.answered(done.request.operation or "none", status, done.duration_s)
        tallies.bytes_in += done.bytes_in
        tallies.bytes_out += done.bytes_out
        if self._record is not None:
            facts: dict[str, str | int] = {
                "http.response.status_code": status,
                "storaged.request_id": done.request_id,
                "storaged.bucket": done.bucket,
                "storaged.code": done.code,
                "storaged.bytes_in": done.bytes_in,
                "storaged.bytes_out": done.bytes_out,
            }
            self._record(done.operation or done.method, done.duration_s, facts, done.trace)
        if status in (401, 403) and self._trail is not None:
            refuse(self._trail, done)
        if status >= 500 and done.code != "NotImplemented":
            self._log.warning("failed", **fields_of(done))
        elif done.duration_s > self._slow_s > 0 and self._is_slow(done):
            self._log.warning("slow", **fields_of(done))
        elif self._access:
            self._log.info("answered", **fields_of(done))
        elif self._level.isEnabledFor(logging.DEBUG):
            self._log.debug("answered", **fields_of(done))

    def _is_slow(self, done: RequestDone) -> bool:
        return done.duration_s - self._slow_s > (done.bytes_in + done.bytes_out) / SLOW_BYTES_PER_S


def refuse(trail: Trail, done: RequestDone) -> None:
    """Counts a denied request. One without a valid signature gets no access key in the entry."""
    actor = f"s3:{done.access_key}" if done.access_key else f"address:{done.remote}"
    path = done.target.partition("?")[0]
    trail.refused(
        "s3.refused", done.code or "AccessDenied", actor=actor, target=path, operation=done.operation or "none"
    )


def fields_of(done: RequestDone) -> dict[str, str | int | float | bool]:
    """The fields of a line. ``ms``: from the request's first byte to the answer's last."""
    return {
        "id": done.request_id,
        "operation": done.operation,
        "method": done.method,
        "target": done.target,
        "status": done.status,
        "code": done.code,
        "remote": done.remote,
        "user": done.access_key,
        "bytes_in": done.bytes_in,
        "bytes_out": done.bytes_out,
        "ms": round(done.duration_s * 1000, 1),
        "complete": done.complete,
    }
