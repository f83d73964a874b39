"""Bucket names, by AWS's rules for general purpose buckets. Pure.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
"""

from __future__ import annotations

import re

_POSSIBLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_VALID = re.compile(r"[a-z0-9](?:[a-z0-9.-]{1,61})[a-z0-9]")
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
_PREFIXES = ("xn--", "sthree-")
_SUFFIXES = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")


def bucket_name_possible(name: str) -> bool:
    """Whether a bucket can have this name. Old buckets may have names that a new one can't get."""
    return _POSSIBLE.fullmatch(name) is not None


def bucket_name_valid(name: str) -> bool:
    """Whether a new bucket may have this name."""
    return (
        _VALID.fullmatch(name) is not None
        and not any(pair in name for pair in ("..", ".-", "-."))
        and _ADDRESS.fullmatch(name) is None
        and not name.startswith(_PREFIXES)
        and not name.endswith(_SUFFIXES)
    )
