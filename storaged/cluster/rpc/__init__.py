"""Calls between nodes: length-prefixed msgpack frames with raw bodies, in packets, after a handshake of mutual TLS 1.3.

``framing`` defines and parses frames, ``packets`` what carries them, both without I/O. ``handshake`` makes a connection
secure. ``connection`` moves frames. ``listener``, ``server``
and ``server_connection`` answer; ``pool``, ``link`` and ``client_connection`` ask. ``faults`` carries errors, and
``authority`` is the table of which role may call which method.
"""

from storaged.cluster.rpc.client_connection import PoolLimits
from storaged.cluster.rpc.framing import BODY_BYTES_MAX, HEAD_BYTES_MAX, PROTOCOL_VERSION
from storaged.cluster.rpc.link import LinkStatistics
from storaged.cluster.rpc.pool import PoolStatistics, RpcPool
from storaged.cluster.rpc.server import RpcServer, ServerStatistics
from storaged.cluster.rpc.server_connection import ServerLimits

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
