"""What clients may take before they have authenticated: connections, requests, bytes; from one address, and all
together.

Theory of operation. Whoever can open a connection can keep it, begin requests, and send bytes that somebody has to
keep, all
without a key. So a connection is a stranger's until its first request is authenticated, and strangers have limits of
their own,
for each address: a /64 of IPv6, which one customer has (RFC 6177), one address of IPv4. Who has signed is not counted
here, and
strangers are not counted among the requests in flight, so no number of them keeps a signed request from its place.

Where a limit is reached the oldest stranger goes, and the newest stays: a client that signs is a stranger for a few
milliseconds
only, so it gets through while somebody else at its address, behind the same NAT, holds all that may be held. Addresses
in
``proxies`` have no limits: all of a site's clients come from there, and what they may is the proxy's to say.
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
    """A stranger's connection."""

    def evict(self) -> None: ...


@lru_cache(maxsize=4096)
def address_key(remote: str) -> str:
    """Whose limits a peer has: an IPv4 address, or the /64 of an IPv6 address. ``remote`` may have a zone
    (``fe80::1%eth0``).
    """
    if ":" not in remote:
        return remote
    address = ipaddress.IPv6Address(remote.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


class _Address:
    """The strangers of one address."""

    __slots__ = ("asking", "bytes", "keeping", "open")

    def __init__(self) -> None:
        self.open: OrderedDict[Stranger, None] = OrderedDict()
        self.asking: OrderedDict[Stranger, None] = OrderedDict()
        self.keeping: OrderedDict[Stranger, None] = OrderedDict()
        self.bytes = 0
        """Of those that are keeping."""


class Stranger:
    """One connection, until it ``leaves``."""

    __slots__ = ("_all", "_kept_bytes", "address", "connection", "key")

    def __init__(self, everybody: Strangers, connection: Evictable, key: str, address: _Address) -> None:
        self._all = everybody
        self.connection = connection
        self.key = key
        self.address = address
        self._kept_bytes = 0

    def leaves(self) -> None:
        """It has authenticated, or is gone. Safe to call twice."""
        self.keeps(0)
        self._all._forget(self)

    def keeps(self, size: int) -> None:
        """So many bytes of it are kept now."""
        address = self.address
        address.bytes += size - self._kept_bytes
        self._kept_bytes = size
        if size:
            address.keeping[self] = None
            self._all._bound_bytes(self)
        else:
            address.keeping.pop(self, None)

    def asks(self, asking: bool) -> None:
        """A request of it is being served, or no longer is."""
        if not asking:
            self.address.asking.pop(self, None)
        elif self in self.address.open:
            self.address.asking[self] = None
            self._all._bound_requests(self)


@dataclass(frozen=True, slots=True)
class StrangerCounts:
    connections: int
    addresses: int
    evicted_total: int


class Strangers:
    """All strangers of one front. ``proxies``: networks without limits."""

    def __init__(self, limits: Limits, proxies: Sequence[str] = ()) -> None:
        self._limits = limits
        self._proxies = tuple(ipaddress.ip_network(proxy) for proxy in proxies)
        self._addresses: dict[str, _Address] = {}
        self._open: OrderedDict[Stranger, None] = OrderedDict()
        self._evicted_total = 0

    def counts(self) -> StrangerCounts:
        return StrangerCounts(len(self._open), len(self._addresses), self._evicted_total)

    def came(self, connection: Evictable, remote: str) -> Stranger:
        """A new connection. The oldest of its address goes if there are too many."""
        key = self._key(remote)
        address = self._addresses.get(key) or self._addresses.setdefault(key, _Address())
        stranger = Stranger(self, connection, key, address)
        self._open[stranger] = address.open[stranger] = None
        if key and len(address.open) > self._limits.stranger_connections_max:
            self._evict(next(iter(address.open)))
        return stranger

    def make_room(self) -> bool:
        """Ends the oldest stranger's connection, of any address; False: there is none."""
        if not self._open:
            return False
        self._evict(next(iter(self._open)))
        return True

    def end_all(self) -> None:
        """Ends the connections of all strangers."""
        while self.make_room():
            pass

    def _key(self, remote: str) -> str:
        """Empty for who has no limits."""
        if self._proxies and remote:
            address = ipaddress.ip_address(remote.partition("%")[0])
            mapped = getattr(address, "ipv4_mapped", None)
            if any((mapped or address) in network for network in self._proxies):
                return ""
        return address_key(remote)

    def _bound_bytes(self, newest: Stranger) -> None:
        address = newest.address
        while newest.key and address.bytes > self._limits.stranger_bytes_max:
            self._evict(next(iter(address.keeping)))

    def _bound_requests(self, newest: Stranger) -> None:
        asking = newest.address.asking
        if newest.key and len(asking) > self._limits.stranger_requests_max:
            self._evict(next(iter(asking)))

    def _evict(self, stranger: Stranger) -> None:
        self._evicted_total += 1
        stranger.leaves()
        stranger.connection.evict()

    def _forget(self, stranger: Stranger) -> None:
        address = stranger.address
        self._open.pop(stranger, None)
        address.asking.pop(stranger, None)
        address.open.pop(stranger, None)
        if not address.open and self._addresses.get(stranger.key) is address:
            del self._addresses[stranger.key]
