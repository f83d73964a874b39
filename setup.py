"""Builds storaged as pyproject.toml says. With STORAGED_COMPILE=1 the modules below become native code on the way, by mypyc: deploy/README.md tells how and what for.

What is listed is code without coroutines that many operations pass through. tests/unit/test_compiled.py says what a module must not contain to be listed, and why.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import setup

COMPILED = [
    "storaged/ids.py",
    "storaged/clock.py",
    "storaged/sov1.py",
    "storaged/trace.py",
    "storaged/cluster/framing.py",
    "storaged/meta/register.py",
    "storaged/meta/pending.py",
    "storaged/meta/apply.py",
    "storaged/meta/heap.py",
    "storaged/meta/redo.py",
    "storaged/meta/remembered.py",
    "storaged/meta/changes.py",
    "storaged/meta/rowvalue.py",
    "storaged/meta/rowkey.py",
    "storaged/meta/lookup.py",
    "storaged/meta/bounds.py",
    "storaged/meta/heads.py",
    "storaged/meta/stretch.py",
    "storaged/meta/scan.py",
    "storaged/fragments/engine.py",
    "storaged/fragments/files.py",
    "storaged/objects/opened.py",
    "storaged/objects/seal.py",
    "storaged/objects/checksums.py",
    "storaged/objects/listed.py",
    "storaged/s3/http.py",
    "storaged/s3/sigv4.py",
    "storaged/s3/auth.py",
    "storaged/s3/headers.py",
    "storaged/s3/xml.py",
]


def extensions() -> list[Any]:
    if os.environ.get("STORAGED_COMPILE") != "1":
        return []
    if "editable_wheel" in sys.argv:
        raise SystemExit("STORAGED_COMPILE=1 is for wheels: native code beside sources that are edited would hide every change")
    from mypyc.build import mypycify

    return list(
        mypycify(["--config-file=pyproject.toml", *COMPILED], opt_level="2", debug_level="0", multi_file=True, group_name="storaged")
    )


setup(ext_modules=extensions())
