"""Messages and rows that version 0.1.0 wrote, byte for byte: this program reads them, and knows what they do not say.

Nodes are restarted into this program one after the other, so until the last one they get these messages.
"""

from __future__ import annotations

import msgspec
import pytest

from storaged.cluster.ports import LedgerReport
from storaged.fragments.format import Retire
from storaged.fragments.index_rows import RetireRow
from storaged.fragments.messages import RetireRequest
from storaged.fragments.ports import Retirement
from storaged.maintain.repair import NO_RECODING_S, Waits
from storaged.meta import messages
from storaged.meta.names import Ballot, Value
from storaged.wire import decode

BALLOT = Ballot(1, 7, "gw1", b"incarnat")
VALUE = Value(5, b"\x22" * 16, 2, b"body", b"p" * 16)
_BALLOT = "940107a3677731c408696e6361726e6174"
_VALUE = "9505c4102222222222222222222222222222222202c404626f6479c41070707070707070707070707070707070"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (  # its row counts as accepted with its copy
            f"9500{_BALLOT}{_BALLOT}{_VALUE}c2",
            messages.PrepareReply(0, BALLOT, BALLOT, VALUE, final=False, copied=True),
        ),
        (  # a copy that it does not send may be there: it is not taken for lost; and no fence of it proves an end
            f"9700{_BALLOT}c4086464646464646464{_VALUE}c404636f7079c40468656164c2",
            messages.ReadReply(
                0, BALLOT, b"d" * 8, VALUE, b"copy", b"head", copied=True, copy_absent=False, final=False
            ),
        ),
        (
            "95a26431c41069696969696969696969696969696969c4056f776e6572079193c4106a6a6a6a6a6a6a6a6a6a6a6a6a6a6a6ac405"
            "6f776e657208",
            RetireRequest("d1", b"i" * 16, b"owner", 7, (Retirement(b"j" * 16, b"owner", 8),), origin=b""),
        ),
        ("96c4056f776e657207015a0390", RetireRow(b"owner", 7, 1, 90, 3, origin=b"")),
        ("9403c41069696969696969696969696969696969c4056f776e657207", Retire(b"i" * 16, b"owner", 7, origin=b"")),
        (  # it does not count in a majority of ledgers on its own word
            "93c4106c6c6c6c6c6c6c6c6c6c6c6c6c6c6c6cc3c41079797979797979797979797979797979",
            LedgerReport(b"l" * 16, formed=True, yours=b"y" * 16, whole=False),
        ),
        ("9390cbbff0000000000000cb0000000000000000", Waits((), NO_RECODING_S, 0.0, gateway="")),
    ],
)
def test_it_is_read_and_says_nothing_that_it_did_not_know(written: str, read: msgspec.Struct) -> None:
    assert decode(bytes.fromhex(written), type(read)) == read
