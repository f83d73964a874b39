"""One trial cluster for all tests of a run: starting it takes seconds, and the tests keep to buckets of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Running and healthy; a test that takes a node down brings it back."""
    found = Cluster(Path(tmp_path_factory.mktemp("dev")) / "s3")
    try:
        yield found.start()
    finally:
        found.stop()
