"""Two parsers of the same bytes are how requests are smuggled: over hostile input ours agrees with second
implementations, or a rule of ``agreement``, by name, says why it is the stricter one."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.property import agreement

EXAMPLES = settings(max_examples=examples(400), deadline=None)

HOSTILE = (
    b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b"\x0b", b"\x0c", b"\x1c", b"\x7f", b"\x80", b"\x85", b"\xa0",
    b"\xff", b"\xc2\xa0", b"\xe2\x80\x83",
    b"\xe2\x84\xaa", b"\xd9\xa5", b":", b",", b";", b"=", b'"', b"\\", b"/", b"@", b"[", b"%", b"0", b"1", b"a",
    b"x", b"-", b"--", b"\r\n\r\n",
)  # fmt: skip


@st.composite
def broken(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes of something right are put in, taken out, or doubled."""
    data = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("in", "in", "out", "over", "double")))
        size = draw(st.integers(1, 4))
        if kind == "out":
            data = data[:at] + data[at + size :]
        elif kind == "double":
            data = data[:at] + data[at : at + 3 * size] * 2 + data[at + 3 * size :]
        else:
            data = data[:at] + draw(st.sampled_from(HOSTILE)) + data[at + (size if kind == "over" else 0) :]
    return data


# --- heads

_VALUES = {
    b"Host": (b"h", b"h:80", b"", b"[::1]:9000", b"h,h", b"a b"),
    b"Content-Length": (b"0", b"5", b"05", b"+5", b"5,5", b"5 5", b"0x5", b"", b"99999999999999999999"),
    b"Transfer-Encoding": (
        b"chunked",
        b"Chunked",
        b"gzip, chunked",
        b"identity",
        b"chunked, chunked",
        b"chun\xe2\x84\xaaed",
        b"chunked\xc2\xa0",
        b"",
    ),
    b"Connection": (b"close", b"keep-alive", b"Close, x", b"keep-alive, close", b"\xe2\x84\xaaeep-alive"),
    b"Expect": (b"100-continue",),
    b"X-Amz-Date": (b"20130524T000000Z", b"\xd9\xa5"),
    b"X-Amz-Meta-A": (b"v", b"caf\xe9", b"", b" v\t"),
    b"Range": (b"bytes=0-", b"bytes=\xd9\xa5-"),
}
_FIELDS = st.one_of(
    *(
        st.builds(b"%b:%b%b".__mod__, st.tuples(st.just(name), st.sampled_from((b"", b" ")), st.sampled_from(values)))
        for name, values in _VALUES.items()
    )
)
_HEADS = st.builds(
    lambda line, host, fields: b"\r\n".join([line, *host, *fields]),
    st.builds(
        b"%b %b %b".__mod__,
        st.tuples(
            st.sampled_from((b"GET", b"PUT", b"POST", b"HEAD", b"DELETE", b"OPTIONS")),
            st.sampled_from(
                (
                    b"/",
                    b"/b/k?x=1",
                    b"/b//k%20",
                    b"http://h/b",
                    b"http://x/b",
                    b"https://h:443/",
                    b"*",
                    b"http:///a",
                    b"/a#b",
                    b"/\xc3\xa9",
                )
            ),
            st.sampled_from(
                (b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9")
            ),
        ),
    ),
    st.sampled_from(([b"Host: h"], [b"Host: h"], [b"Host: h"], [])),
    st.lists(_FIELDS, max_size=3),
)


@EXAMPLES
@given(broken(_HEADS))
@example(b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chun\xe2\x84\xaaed")
@example(b"GET http://h HTTP/1.1\r\nHost: h")
@example(b"GET /a\xc3\xa9 HTTP/1.1\r\nHost: h")
@example(b"GET / HTTP/1.1\r\nHost: h\r\nRangenge: bytes=\xd9\xa5-")
@example(b"GET / HTTP/1.1\r\nHost: h" + b"\r\na: b" * 128)
def test_heads_are_what_the_grammar_says(raw: bytes) -> None:
    agreement.heads_are_what_the_grammar_says(raw)


@EXAMPLES
@given(broken(_HEADS))
def test_heads_are_what_llhttp_says(raw: bytes) -> None:
    agreement.heads_are_what_llhttp_says(raw)


# --- chunks

_EXTENSIONS = st.sampled_from((b"", b"", b";a", b";a=b", b' ; a="b;\\"c"', b";", b";=", b"; a b"))
_TRAILERS = st.lists(
    st.sampled_from((b"A: b\r\n", b"Content-Length: 5\r\n", b"X:\r\n", b"a\r\n", b": b\r\n", b"A : b\r\n")), max_size=2
)


@st.composite
def _chunked(draw: st.DrawFn) -> bytes:
    wire = b""
    for _ in range(draw(st.integers(0, 3))):
        data = draw(st.sampled_from((b"a", b"hello", b"\r\n", b"0\r\n\r\n", b"5\r\n", b"x" * 20)))
        size = draw(st.sampled_from((b"%x", b"%X", b"%03x"))) % len(data)
        wire += size + draw(_EXTENSIONS) + b"\r\n" + data + b"\r\n"
    return wire + b"0" + draw(_EXTENSIONS) + b"\r\n" + b"".join(draw(_TRAILERS)) + b"\r\n"


@EXAMPLES
@given(broken(_chunked()), st.sampled_from((1, 2, 3, 7, 1000)))
@example(b"1\r\na\r\n" * 200 + b"0\r\n\r\n", 5)
@example(b"1\r\na\r\n0\r\nA: " + b"[" * 1100 + b"\r\n\r\n", 7)
@example(b"1\r\na\r\n0\r\n" + b"A: b\r\n" * 1500 + b"\r\n", 7)
def test_chunks_are_what_the_grammar_says(wire: bytes, step: int) -> None:
    agreement.chunks_are_what_the_grammar_says(wire, step)


@EXAMPLES
@given(broken(_chunked()), st.sampled_from((1, 3, 1000)))
def test_chunks_are_what_llhttp_says(wire: bytes, step: int) -> None:
    agreement.chunks_are_what_llhttp_says(wire, step)


# --- aws-chunked


@EXAMPLES
@given(
    st.data(),
    st.lists(st.sampled_from((b"a", b"hello", b"\r\n", b"0\r\n\r\n")), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from((1, 5, 1000)),
)
def test_aws_chunked_is_what_aws_describes(
    data: st.DataObject, pieces: list[bytes], signed: bool, trailing: bool, step: int
) -> None:
    wire = data.draw(broken(st.just(agreement.aws_wire(pieces, signed, trailing))))
    agreement.aws_chunked_is_what_aws_describes(wire, signed, trailing, step)


# --- forms

_DISPOSITIONS = st.sampled_from(
    (
        b'form-data; name="key"', b'form-data; name="Key"', b"form-data; name=acl", b'form-data; name="a;b"',
        b'Form-Data; NAME="x"', b"form-data",
        b'form-data; name="a"; name="b"', b'form-data; filename="n; name=q"; name="y"',
        b'attachment; name="z"', b'form-data; name="\\"q\\""',
    )
)  # fmt: skip
_PART_HEADERS = st.sampled_from(
    (
        b"",
        b"",
        b"",
        b"\r\nContent-Type: text/plain",
        b"\r\nContent-Transfer-Encoding: base64",
        b'\r\nContent-Disposition: form-data; name="key"',
        b"\r\nX: a\r\n b",
    )
)
_CONTENTS = st.sampled_from((b"", b"v", b"a\r\nb", b"--b", b"\r\n--bx", b"\n--b", b"\r\n\r\n", b"\xff\x00"))


@st.composite
def _forms(draw: st.DrawFn) -> bytes:
    parts = [(draw(_DISPOSITIONS), draw(_PART_HEADERS), draw(_CONTENTS)) for _ in range(draw(st.integers(0, 3)))]
    parts.append((b'form-data; name="file"; filename="f"', draw(_PART_HEADERS), draw(_CONTENTS)))
    if draw(st.booleans()):
        parts.append((b'form-data; name="submit"', b"", b"after the file"))
    start = draw(st.sampled_from((b"", b"", b"preamble\r\n")))
    return (
        start
        + b"".join(b"--b\r\nContent-Disposition: %b%b\r\n\r\n%b\r\n" % part for part in parts)
        + b"--b--"
        + draw(st.sampled_from((b"", b"\r\n", b"x")))
    )


@EXAMPLES
@given(broken(_forms()), st.sampled_from((1, 4, 1000)))
def test_forms_are_what_the_grammar_says(body: bytes, step: int) -> None:
    agreement.forms_are_what_the_grammar_says(body, step)


@EXAMPLES
@given(broken(_forms()))
def test_a_form_that_is_taken_is_what_an_e_mail_parser_reads(body: bytes) -> None:
    agreement.a_form_that_is_taken_is_what_an_e_mail_parser_reads(body)


@pytest.mark.parametrize("length", [900, 1100])
def test_a_checksum_of_any_length_is_taken_or_too_long_for_a_line(length: int) -> None:
    wire = b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:" + b"A" * length + b"\r\n\r\n"
    agreement.aws_chunked_is_what_aws_describes(wire, False, True, 64)
