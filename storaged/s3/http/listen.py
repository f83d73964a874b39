"""The listening sockets of an S3 port. They serve its connections, or hand them out to worker processes."""

from __future__ import annotations

import errno
import socket

from storaged.errors import PortInUse

BACKLOG = 1024


def listen(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of the name ``host`` whose family this machine's kernel has, all with the same port
    (``port`` 0: any that is free). Raises PortInUse, OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys(
        (family, address) for family, _, _, _, address in found
    )  # /etc/hosts may have a line twice
    listeners: list[socket.socket] = []
    try:
        for number, (family, address) in enumerate(addresses, 1):
            try:
                listener = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:  # a name may have IPv6 addresses where the kernel has no IPv6
                if error.errno == errno.EAFNOSUPPORT and (listeners or number < len(addresses)):
                    continue
                raise
            listeners.append(listener)
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            port = int(listener.getsockname()[1])
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"{host}:{port} is already in use by another program.") from None
        raise
    return listeners
