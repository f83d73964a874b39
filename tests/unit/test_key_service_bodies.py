"""The suite of the key service on every body: the keyring, and the double."""

from __future__ import annotations

from pathlib import Path

import pytest

from storaged.keys import Keyring, create_keyring
from tests.doubles.keys import MemoryKeys
from tests.suites.key_service import KeyServiceSuite
from tests.unit.test_keyring import CREDENTIAL, Rig


class TestKeyring(KeyServiceSuite):
    @pytest.fixture
    def keys(self, tmp_path: Path) -> Keyring:
        return Rig(create_keyring(tmp_path / "keyring", CREDENTIAL)).keyring


class TestMemoryKeys(KeyServiceSuite):
    @pytest.fixture
    def keys(self) -> MemoryKeys:
        return MemoryKeys()
