"""What one process of a gateway may use: its share of the limits of the whole gateway, and the settings of its S3 port.
Pure."""

from __future__ import annotations

import dataclasses

from storaged.config import Config, S3Section
from storaged.objects.plane import ObjectLimits
from storaged.s3.context import AccessLogSettings, Endpoint
from storaged.s3.http.limits import Limits
from storaged.units import KIB, MIB

BUFFER_BYTES_MIN = 8 * MIB
"""The least size of each of a worker's three pools."""

LOG_BYTES_MIN = 64 * KIB
"""The least room of a worker for lines of access logs."""


def endpoint_of(config: Config) -> Endpoint:
    s3 = config.s3
    return Endpoint(
        s3.region,
        legacy_buckets=s3.new_buckets == "legacy",
        strict_region=s3.strict_region,
        domains=s3.domains,
        website_domain=s3.website_domain,
        proxies=s3.proxies,
        limits=shared_limits(config.limits.s3_requests_max, s3),
        access_logs=AccessLogSettings(
            s3.access_log_interval_s, max(s3.access_log_bytes_max // s3.workers, LOG_BYTES_MIN)
        ),
    )


def shared_out(limits: ObjectLimits, workers: int) -> ObjectLimits:
    """A worker's share of the memory that a whole gateway may use; its buffers suffice for a few large transfers."""
    buffers = ("fill_buffer_bytes_max", "put_buffer_bytes_max", "get_buffer_bytes_max")
    shares = {name: max(getattr(limits, name) // workers, BUFFER_BYTES_MIN) for name in buffers}
    shares |= {name: getattr(limits, name) // workers for name in ("opened_bytes_max", "listed_bytes_max")}
    return dataclasses.replace(limits, **shares)


def shared_limits(requests_max: int, s3: S3Section) -> Limits:
    """A worker's share of the limits of a whole gateway. Connections are handed out in turn, so the
    shares are equal.
    """

    def part(whole: int) -> int:
        return -(-whole // s3.workers)

    return Limits(
        requests_max=part(requests_max),
        connections_max=part(Limits.connections_max),
        whole_bytes_max=part(Limits.whole_bytes_max),
        unauthenticated_connections_max=part(s3.unauthenticated_connections_max),
        unauthenticated_requests_max=part(s3.unauthenticated_requests_max),
        unauthenticated_bytes_max=part(s3.unauthenticated_bytes_max),
    )
