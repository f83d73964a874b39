"""The program with a change in one of its modules: a planted bug, a mutant, or counters in its branches.

Modules are changed as they are imported, so a change is complete: constants that others import, defaults and classes
too. ``in_child`` does it in a process of its own. What calls it must not have imported the program before.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

Change = Callable[[str], str | ast.AST]
"""From a module's source to another source, or its tree."""

THIRD_PARTY = (
    "asyncio",
    "lmdb",
    "msgspec",
    "structlog.testing",
    "xxhash",
    "cryptography.hazmat.primitives.ciphers.aead",
)
"""Imported once, before children are made."""


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, change: Change) -> None:
        super().__init__(name, path)
        self._change = change

    def get_code(self, fullname: str) -> CodeType:
        """Never from a cache."""
        changed = self._change(self.get_data(self.path).decode())
        return compile(changed, self.path, "exec", dont_inherit=True)  # type: ignore[arg-type]


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, changes: dict[str, Change]) -> None:
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = self._changes.get(fullname)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, change)
        return spec


def change_imports(changes: dict[str, Change]) -> None:
    """By path of a module, from the root of the project. In this process, for ever."""
    already = [path for path in changes if module_of(path) in sys.modules]
    assert not already, f"imported before it was changed: {already}"
    sys.meta_path.insert(0, _Finder({module_of(path): change for path, change in changes.items()}))


def resolve(reference: str) -> Any:
    """``module:name``, imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


class Outcome(NamedTuple):
    """``value``: what the work returned. ``error``: what it raised, or that it was killed."""

    value: Any
    error: str
    cpu_s: float


def in_child(work: Callable[[], Any], *, limit_s: float = 3600.0) -> Outcome:
    """Calls ``work`` in a child process. Its result must be picklable."""
    for name in THIRD_PARTY:
        importlib.import_module(name)
    began = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _serve(work, writing)
    os.close(writing)
    received = b""
    os.set_blocking(reading, False)
    while True:
        try:
            piece = os.read(reading, 1 << 16)
        except BlockingIOError:
            if time.monotonic() - began > limit_s:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
            continue
        if not piece:
            break
        received += piece
    os.close(reading)
    _, _, usage = os.wait4(child, 0)
    value, error = pickle.loads(received) if received else (None, "it was killed, or took too long")
    return Outcome(value, error, usage.ru_utime + usage.ru_stime)


def _serve(work: Callable[[], Any], writing: int) -> None:
    try:
        outcome: tuple[Any, str] = work(), ""
    except BaseException as error:
        outcome = None, f"{type(error).__name__}: {error} {traceback.format_exc(limit=-3)}"
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)
