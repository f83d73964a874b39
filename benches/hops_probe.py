"""The part of ``benches.hops`` that runs inside a server: it counts calls of this package's functions on request.

``benches.hops`` puts a copy of this file, named ``sitecustomize.py``, first on the path of the servers that it starts.
Python imports that module before everything else. It imports nothing of storaged, so it counts any revision.

A process listens on the datagram socket ``$HOPS_DIR/PID``. It answers ``start`` with ``{}`` and ``stop`` with its
counts. Only the main thread is counted: the event loop runs there, and no other thread makes a step of a request.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections import Counter
from types import FrameType
from typing import Any

PACKAGE = "storaged"


class Probe:
    """Counts calls between ``start`` and ``stop``. A coroutine that goes on after it waited counts as a call again."""

    def __init__(self) -> None:
        self._counting = False
        self._calls: Counter[tuple[str, str, str]] = Counter()
        """By module of the caller, module, and name of the function."""

    def on_event(self, frame: FrameType, event: str, _argument: Any) -> None:
        """A ``sys.setprofile`` function."""
        if event != "call" or not self._counting:
            return
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == PACKAGE:
            caller = frame.f_back.f_globals.get("__name__", "") if frame.f_back is not None else ""
            self._calls[caller, module, frame.f_code.co_qualname] += 1

    def serve(self, path: str) -> None:
        """Answers requests for ever."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.bind(path)
            while True:
                request, sender = own.recvfrom(64)
                answer: list[Any] = []
                if request == b"start":
                    self._calls, self._counting = Counter(), True
                else:
                    self._counting = False
                    answer = [[*call, count] for call, count in self._calls.items()]
                with contextlib.suppress(OSError):
                    own.sendto(json.dumps(answer).encode(), sender)


def install() -> None:
    """Counts in this process and in those that it forks, when ``HOPS_DIR`` says where to listen."""
    folder = os.environ.get("HOPS_DIR")
    if not folder:
        return
    probe = Probe()

    def serve() -> None:
        path = os.path.join(folder, str(os.getpid()))
        threading.Thread(target=probe.serve, args=(path,), daemon=True).start()

    serve()
    os.register_at_fork(after_in_child=serve)  # a trial cluster's nodes are forked
    sys.setprofile(probe.on_event)


if __name__ == "sitecustomize":
    install()
