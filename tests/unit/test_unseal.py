"""The stand-alone opener agrees with the sealer, imports nothing of storaged, and writes nothing that it did not
verify.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from storaged import unseal as module
from storaged.objects.code.seal import PartSealer
from storaged.unseal import main

SCRIPT = Path(module.__file__)
DEK, DATA_ID = bytes(range(32)), bytes(range(100, 116))


def sealed_part(plain: bytes, chunk_bytes: int = 4096) -> bytes:
    sealer = PartSealer(DEK, DATA_ID, 3, chunk_bytes, b"s" * 24)
    out = bytearray(len(plain) + 16 * (len(plain) // (chunk_bytes - 16) + 1))
    sealer.seal_block(0, plain, memoryview(out), last=True)
    return sealer.header + out


def arguments(*more: str) -> list[str]:
    return ["--key", DEK.hex(), "--data-id", DATA_ID.hex(), "--part", "3", *more]


@pytest.fixture
def part(tmp_path):
    plain = bytes(i * 13 % 251 for i in range(3 * 4080 + 100))
    (tmp_path / "sealed").write_bytes(sealed_part(plain))
    return tmp_path / "sealed", tmp_path / "plain", plain


def test_it_imports_nothing_of_the_package():
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"cryptography"}


@pytest.mark.parametrize("size", [0, 1, 4079, 4080, 4081, 8160, 100_000])
@pytest.mark.parametrize("chunk_bytes", [4096, 65536])
def test_it_opens_what_the_sealer_sealed(tmp_path, size, chunk_bytes):
    plain = bytes(i % 251 for i in range(size))
    (tmp_path / "sealed").write_bytes(sealed_part(plain, chunk_bytes))
    assert main(arguments(str(tmp_path / "sealed"), "-o", str(tmp_path / "plain"))) == 0
    assert (tmp_path / "plain").read_bytes() == plain


def test_the_published_vectors_open(tmp_path):
    for vector in json.loads((Path(__file__).parents[1] / "vectors" / "seal.json").read_text())["parts"]:
        (tmp_path / "sealed").write_bytes(bytes.fromhex("".join(vector["chunks"])))
        identity = [
            "--key",
            vector["dek"],
            "--data-id",
            vector["data_id"],
            "--part",
            str(vector["part_number"]),
            "--header",
            vector["header"],
        ]
        assert main([*identity, str(tmp_path / "sealed"), "-o", str(tmp_path / "plain")]) == 0
        assert (tmp_path / "plain").read_bytes() == bytes(7 * i % 256 for i in range(vector["plaintext_pattern"]))


@pytest.mark.parametrize("content", [DEK, DEK.hex().encode(), DEK.hex().encode() + b"\n"])
def test_the_key_may_come_from_a_file_raw_or_in_hex(tmp_path, part, content):
    (tmp_path / "key").write_bytes(content)
    identity = ["--key-file", str(tmp_path / "key"), "--data-id", DATA_ID.hex(), "--part", "3"]
    assert main([*identity, str(part[0]), "-o", str(part[1])]) == 0
    assert part[1].read_bytes() == part[2]


def damaged(data: bytes, change: str) -> bytes:
    flip = {"chunk 2": 64 + 2 * 4096 + 7, "magic": 0, "suite": 4, "reserved": 6, "salt": 9, "commitment": 63}
    if change in flip:
        return data[: flip[change]] + bytes([data[flip[change]] ^ 1]) + data[flip[change] + 1 :]
    return {"cut": data[:-20], "cut at a border": data[: 64 + 3 * 4096], "longer": data + b"x", "no header": data[:50]}[
        change
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("chunk 2", "chunk 2 (bytes 8192 to 12287 after the header) is damaged"),
        ("magic", "not a sealed part"),
        ("suite", "suite 0 is unknown"),
        ("reserved", "malformed"),
        ("salt", "does not commit"),
        ("commitment", "does not commit"),
        ("cut", "chunk 3 "),
        ("cut at a border", "cut short at chunk 3"),
        ("longer", "chunk 3 "),
        ("no header", "50 bytes instead of 64"),
    ],
)
def test_damage_is_named_and_leaves_no_output(part, capsys, change, message):
    source, target, _ = part
    source.write_bytes(damaged(source.read_bytes(), change))
    assert main(arguments(str(source), "-o", str(target))) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in source.parent.iterdir()] == ["sealed"]


def test_another_part_number_or_key_does_not_open(part, capsys):
    assert main(["--key", DEK.hex(), "--data-id", DATA_ID.hex(), "--part", "4", str(part[0]), "-o", str(part[1])]) == 1
    assert main(["--key", "00" * 32, "--data-id", DATA_ID.hex(), "--part", "3", str(part[0]), "-o", str(part[1])]) == 1
    assert capsys.readouterr().err.count("does not commit to this key, data id and part number") == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--key", "zz", "--data-id", DATA_ID.hex()], "--key must be 64 hexadecimal digits"),
        (["--key", DEK.hex(), "--data-id", "00"], "--data-id must be 32"),
        (["--key", DEK.hex(), "--data-id", DATA_ID.hex(), "--part", "-1"], "--part must be"),
        (["--key", DEK.hex(), "--data-id", DATA_ID.hex(), "--header", "00"], "--header must be 128"),
        (["--key-file", "nowhere", "--data-id", DATA_ID.hex()], "No such file"),
    ],
)
def test_wrong_arguments_are_said_to_be(part, capsys, bad, message):
    assert main([*bad, str(part[0]), "-o", str(part[1])]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert DEK.hex() not in shown
    assert not part[1].exists()


def test_a_file_left_by_another_run_is_not_touched(part, capsys):
    partial = part[1].with_name("plain.partial")
    partial.write_bytes(b"other")
    assert main(arguments(str(part[0]), "-o", str(part[1]))) == 2
    assert "another run" in capsys.readouterr().err
    assert partial.read_bytes() == b"other"
