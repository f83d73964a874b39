"""What clients may use before they have authenticated: connections, requests, bytes; per address, and in all.

Theory of operation. Anyone who can open a connection can keep it, begin requests, and send bytes that the server has to
keep, all without a key. So a connection counts as unauthenticated until its first request is authenticated, and such
connections have limits of their own per address: one IPv4 address, or a /64 of IPv6, which one customer has (RFC 6177).
Authenticated clients are not counted here, and unauthenticated ones are not counted among the requests in flight. So no
number of them keeps a signed request from its place.

Where a limit is reached the oldest client is closed, and the newest stays: a client that signs is unauthenticated for a
few milliseconds only. So it gets through while another client at its address, behind the same NAT, uses up all limits.
Addresses in ``proxies`` have no limits: all of a site's clients come from there, and the proxy limits them.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from storaged.s3.http.limits import Limits


class Evictable(Protocol):
    """The connection of an unauthenticated client."""

    def evict(self) -> None: ...


@lru_cache(maxsize=4096)
def address_key(remote: str) -> str:
    """The address by which a peer is limited: an IPv4 address, or the /64 of an IPv6 address. ``remote`` may have a
    zone (``fe80::1%eth0``)."""
    if ":" not in remote:
        return remote
    address = ipaddress.IPv6Address(remote.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


class _Address:
    """The unauthenticated clients of one address, oldest first."""

    __slots__ = ("bytes", "keeping", "open", "serving")

    def __init__(self) -> None:
        self.open: OrderedDict[UnauthenticatedClient, None] = OrderedDict()
        self.serving: OrderedDict[UnauthenticatedClient, None] = OrderedDict()
        """Those whose request is being served."""
        self.keeping: OrderedDict[UnauthenticatedClient, None] = OrderedDict()
        """Those of which bytes are kept."""
        self.bytes = 0
        """Kept for all of them."""


class UnauthenticatedClient:
    """One connection, until ``remove``."""

    __slots__ = ("_all", "_kept_bytes", "address", "connection", "key")

    def __init__(self, clients: UnauthenticatedClients, connection: Evictable, key: str, address: _Address) -> None:
        self._all = clients
        self.connection = connection
        self.key = key
        """Of the address; empty without limits."""
        self.address = address
        self._kept_bytes = 0

    def remove(self) -> None:
        """The client has authenticated, or is gone. Safe to call twice."""
        self.keep(0)
        self._all._forget(self)

    def keep(self, size: int) -> None:
        """Counts ``size`` bytes as kept for this client now."""
        address = self.address
        address.bytes += size - self._kept_bytes
        self._kept_bytes = size
        if size:
            address.keeping[self] = None
            self._all._bound_bytes(self)
        else:
            address.keeping.pop(self, None)

    def serve(self, serving: bool) -> None:
        """Counts a request of this client as being served, or as answered."""
        if not serving:
            self.address.serving.pop(self, None)
        elif self in self.address.open:
            self.address.serving[self] = None
            self._all._bound_requests(self)


@dataclass(frozen=True, slots=True)
class UnauthenticatedCounts:
    connections: int
    addresses: int
    evicted_total: int


class UnauthenticatedClients:
    """All unauthenticated clients of one S3 port. ``proxies``: networks without limits."""

    def __init__(self, limits: Limits, proxies: Sequence[str] = ()) -> None:
        self._limits = limits
        self._proxies = tuple(ipaddress.ip_network(proxy) for proxy in proxies)
        self._addresses: dict[str, _Address] = {}
        self._open: OrderedDict[UnauthenticatedClient, None] = OrderedDict()
        self._evicted_total = 0

    def counts(self) -> UnauthenticatedCounts:
        return UnauthenticatedCounts(len(self._open), len(self._addresses), self._evicted_total)

    def add(self, connection: Evictable, remote: str) -> UnauthenticatedClient:
        """Counts a new connection, and closes the oldest of its address if there are too many."""
        key = self._key(remote)
        address = self._addresses.get(key) or self._addresses.setdefault(key, _Address())
        client = UnauthenticatedClient(self, connection, key, address)
        self._open[client] = address.open[client] = None
        if key and len(address.open) > self._limits.unauthenticated_connections_max:
            self._evict(next(iter(address.open)))
        return client

    def make_room(self) -> bool:
        """Closes the oldest unauthenticated connection, of any address. False: there is none."""
        if not self._open:
            return False
        self._evict(next(iter(self._open)))
        return True

    def evict_all(self) -> None:
        """Closes all unauthenticated connections."""
        while self.make_room():
            pass

    def _key(self, remote: str) -> str:
        """The address by which ``remote`` is limited; empty for a proxy."""
        if self._proxies and remote:
            address = ipaddress.ip_address(remote.partition("%")[0])
            mapped = getattr(address, "ipv4_mapped", None)
            if any((mapped or address) in network for network in self._proxies):
                return ""
        return address_key(remote)

    def _bound_bytes(self, newest: UnauthenticatedClient) -> None:
        address = newest.address
        while newest.key and address.bytes > self._limits.unauthenticated_bytes_max:
            self._evict(next(iter(address.keeping)))

    def _bound_requests(self, newest: UnauthenticatedClient) -> None:
        serving = newest.address.serving
        if newest.key and len(serving) > self._limits.unauthenticated_requests_max:
            self._evict(next(iter(serving)))

    def _evict(self, client: UnauthenticatedClient) -> None:
        self._evicted_total += 1
        client.remove()
        client.connection.evict()

    def _forget(self, client: UnauthenticatedClient) -> None:
        address = client.address
        self._open.pop(client, None)
        address.serving.pop(client, None)
        address.open.pop(client, None)
        if not address.open and self._addresses.get(client.key) is address:
            del self._addresses[client.key]
