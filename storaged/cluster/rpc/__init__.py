"""Calls between nodes: length-prefixed msgpack frames with raw bodies, over mutual TLS 1.3. It knows no service by
name.

``framing`` says what is on the wire and parses it without I/O, ``connection`` moves frames, ``server`` answers,
``client`` asks, ``faults`` carries errors.
"""

from storaged.cluster.rpc.client import LinkStatistics, PoolLimits, PoolStatistics, RpcPool
from storaged.cluster.rpc.framing import BODY_BYTES_MAX, HEAD_BYTES_MAX, PROTOCOL_VERSION
from storaged.cluster.rpc.server import RpcServer, ServerLimits, ServerStatistics

__all__ = [
    "BODY_BYTES_MAX",
    "HEAD_BYTES_MAX",
    "PROTOCOL_VERSION",
    "LinkStatistics",
    "PoolLimits",
    "PoolStatistics",
    "RpcPool",
    "RpcServer",
    "ServerLimits",
    "ServerStatistics",
]
