#!/usr/bin/env python3
"""Opens a sealed part, given its data key: a second implementation of the format, independent of storaged.

It needs Python and the ``cryptography`` package, and no part of storaged; FORMATS.md (SOV1) describes the format. It
streams the input, and writes no byte before it is authenticated.

    python unseal.py --key-file dek.hex --data-id 0011..ff --part 1 sealed.bin -o plain.bin

The input is the 64-byte header followed by the chunks in their order. Records, and all fragments but copies of small
objects, store the header apart from the chunks; for a copy of a small object, only the record has the header. Then give
the header with --header, and only the chunks as input. Exit status: 0 opened, 1 does not open, 2 wrong arguments or
files.
"""

from __future__ import annotations

import argparse
import hmac
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

HEADER_BYTES = 64
TAG_BYTES = 16
LABEL = b"sov.part.v1\0"


class DoesNotOpen(Exception):
    """The input does not open; the message says why and where."""


class BadUsage(Exception):
    """The arguments make no sense."""


def open_part(key: bytes, data_id: bytes, part_number: int, header: bytes, source: BinaryIO) -> Iterator[bytes]:
    """Yields the plaintext, chunk by chunk; ``source`` begins with the first chunk. Raises DoesNotOpen at the first
    chunk that fails, or at the end when the part is cut short.
    """
    if len(header) < HEADER_BYTES:
        raise DoesNotOpen(f"the header has {len(header)} bytes instead of {HEADER_BYTES}")
    if header[:4] != b"SOV1":
        raise DoesNotOpen("not a sealed part: the magic SOV1 is missing")
    if header[4] != 1:
        raise DoesNotOpen(f"suite {header[4]} is unknown; this program knows 1 (AES-256-GCM, HKDF-SHA512)")
    if not 12 <= header[5] <= 16 or header[6:8] != b"\0\0":
        raise DoesNotOpen("the header is malformed (bytes 5 to 7)")
    chunk_bytes = 1 << header[5]
    info = LABEL + header[:32] + data_id + part_number.to_bytes(4, "big")
    material = HKDFExpand(SHA512(), 76, info).derive(key)
    if not hmac.compare_digest(material[44:], header[32:]):
        raise DoesNotOpen(
            "the header does not commit to this key, data id and part number: one of them is wrong, or the header is"
            " damaged"
        )
    cipher, nonce = AESGCM(material[:32]), int.from_bytes(material[32:44], "big")
    index = 0
    while True:
        chunk = read_exactly(source, chunk_bytes)
        if len(chunk) < TAG_BYTES:
            raise DoesNotOpen(
                f"the part is cut short at chunk {index}: a part ends with a chunk of at least {TAG_BYTES} and less"
                f" than {chunk_bytes} bytes"
            )
        try:
            yield cipher.decrypt((nonce ^ index).to_bytes(12, "big"), chunk, None)
        except InvalidTag:
            raise DoesNotOpen(
                f"chunk {index} (bytes {index * chunk_bytes} to {index * chunk_bytes + len(chunk) - 1} after the"
                " header) is damaged"
            ) from None
        if len(chunk) < chunk_bytes:
            return
        index += 1


def read_exactly(source: BinaryIO, count: int) -> bytes:
    """Reads ``count`` bytes, or fewer at the end. A pipe gives them in pieces."""
    pieces = []
    while count and (piece := source.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def hexadecimal(text: str, length: int, what: str) -> bytes:
    """Decodes hexadecimal digits. Raises BadUsage, which does not show the text: it may be a key."""
    try:
        value = bytes.fromhex(text.strip())
    except ValueError:
        value = b""
    if len(value) != length:
        raise BadUsage(f"{what} must be {length * 2} hexadecimal digits")
    return value


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="unseal.py", description=(__doc__ or "").splitlines()[0], epilog="The format: SOV1 in storaged/FORMATS.md."
    )
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument(
        "--key",
        metavar="HEX",
        help="the data key, 64 hexadecimal digits (other users of the machine can see it: prefer --key-file)",
    )
    keys.add_argument("--key-file", metavar="FILE", help="a file with the data key: 32 bytes, or 64 hexadecimal digits")
    parser.add_argument("--data-id", metavar="HEX", required=True, help="the part's data id, 32 hexadecimal digits")
    parser.add_argument("--part", metavar="N", type=int, default=1, help="the part number (default 1)")
    parser.add_argument(
        "--header", metavar="HEX", help="the header, 128 hexadecimal digits, when the input holds the chunks alone"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write here, once all of it is opened (default: standard output, as it is opened)",
    )
    parser.add_argument("input", metavar="INPUT", help="the sealed part, or - for standard input")
    return parser.parse_args(argv)


def key_of(arguments: argparse.Namespace) -> bytes:
    if arguments.key is not None:
        return hexadecimal(arguments.key, 32, "--key")
    data = Path(arguments.key_file).read_bytes()
    return (
        data
        if len(data) == 32
        else hexadecimal(data.decode("ascii", "replace"), 32, f"the key in {arguments.key_file}")
    )


def unseal(arguments: argparse.Namespace) -> None:
    key = key_of(arguments)
    data_id = hexadecimal(arguments.data_id, 16, "--data-id")
    if not 0 <= arguments.part < 2**32:
        raise BadUsage("--part must be a number from 0 to 4294967295")
    given = None if arguments.header is None else hexadecimal(arguments.header, HEADER_BYTES, "--header")
    source = sys.stdin.buffer if arguments.input == "-" else open(arguments.input, "rb")  # noqa: SIM115 - closed below, but for standard input
    try:
        header = given or read_exactly(source, HEADER_BYTES)
        plaintext = open_part(key, data_id, arguments.part, header, source)
        if arguments.output is None:
            for piece in plaintext:
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            return
        write_whole(Path(arguments.output), plaintext)
    finally:
        if source is not sys.stdin.buffer:
            source.close()


def write_whole(target: Path, pieces: Iterator[bytes]) -> None:
    """Writes a file that appears only when it is complete; removes what was written when a piece fails."""
    partial = target.with_name(target.name + ".partial")
    try:
        with open(partial, "xb") as file:
            try:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                partial.unlink()
                raise
    except FileExistsError:
        raise BadUsage(f"{partial} exists already: from another run, or left by one") from None
    partial.replace(target)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        unseal(arguments_of(argv))
    except DoesNotOpen as broken:
        print(f"unseal: {broken}", file=sys.stderr)
        return 1
    except (BadUsage, OSError) as error:
        print(f"unseal: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
