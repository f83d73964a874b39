"""Log lines: events with named fields, through structlog.

Under systemd a line carries the journal's priority (``<4>`` in front, sd-daemon(3)) and is logfmt. On a terminal it is
coloured; JSON is for containers. Values under names such as ``secret`` or ``authorization`` never reach a line.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import IO, Any, TextIO

import structlog

REDACTED = "***"
_SECRET_NAME = re.compile(
    r"secret|passphrase|password|token|authorization|signature|credential|private|wrapped|\bdek\b|^key$|_key$",
    re.IGNORECASE,
)
_NOT_SECRET = frozenset({"access_key", "object_key", "bucket_key", "credential_file"})
_SECRET_TEXT = re.compile(
    r"(X-Amz-(?:Signature|Security-Token|Credential)=)[^&\s\"]+|(AWS4-HMAC-SHA256 Credential=)\S+.*?(?=$|\n)",
    re.IGNORECASE,
)
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2, "exception": 3}
"""syslog(3) priorities."""


def redact(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replaces values whose names say that they are secret, raw bytes under any name, and signatures inside texts."""
    for name, value in event.items():
        if _SECRET_NAME.search(name) and name not in _NOT_SECRET:
            event[name] = REDACTED
        elif isinstance(value, bytes | bytearray | memoryview):
            event[name] = f"<{len(value)} bytes>"
        elif isinstance(value, str) and ("X-Amz-" in value or "AWS4-HMAC" in value or "x-amz-" in value):
            event[name] = _SECRET_TEXT.sub(lambda match: (match[1] or match[2]) + REDACTED, value)
    return event


def _journal(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    priority = _PRIORITY.get(str(event.get("level", "info")), 6)
    event.pop("timestamp", None)
    return f"<{priority}>" + logfmt(event).replace("\n", f"\n<{priority}>")


def _logfmt_renderer(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    return logfmt(event)


_PLAIN = re.compile(r"[^\s\"=\\]+")


def logfmt(event: Mapping[str, Any]) -> str:
    """``level=info event="node started" name=n1``: one line for any values, except that the text of an exception keeps
    its lines for the operator.
    """
    order = [name for name in ("timestamp", "level", "event") if name in event]
    order += [name for name in event if name not in ("timestamp", "level", "event", "exception")]
    words = []
    for name in order:
        text = str(event[name])
        if not _PLAIN.fullmatch(text):
            text = '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r") + '"'
        if not text.isprintable():  # other nodes and clients choose some texts: these must not control a terminal
            text = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
        words.append(f"{name}={text}")
    line = " ".join(words)
    return f"{line}\n{event['exception']}" if "exception" in event else line


class _StdlibHandler(logging.Handler):
    """Logs lines of libraries that use the standard library's logging (asyncio, aiohttp) in our own format."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(
            max(record.levelno, logging.INFO), record.getMessage(), exc_info=record.exc_info or None, logger=record.name
        )


def choose_format(wanted: str, *, stream: IO[str], environ: Mapping[str, str] = os.environ) -> str:
    """The format to use. ``auto`` becomes journal under systemd, console on a terminal, else logfmt."""
    if wanted != "auto":
        return wanted
    if "JOURNAL_STREAM" in environ:
        return "journal"
    return "console" if stream.isatty() else "logfmt"


def setup_logging(level: str, form: str = "auto", *, stream: TextIO | None = None, **always: str) -> None:
    """Configures structlog for the process; a reload calls it again. ``always`` are fields of every line, such as the
    node's name.
    """
    out = stream or sys.stderr
    chosen = choose_format(form, stream=out)
    renderers: dict[str, Any] = {
        "journal": _journal,
        "json": structlog.processors.JSONRenderer(),
        # Where the package rich is installed, the default prints the local variables of every frame: keys, secrets,
        # content.
        "console": structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback
        ),
        "logfmt": _logfmt_renderer,
    }
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if chosen == "console" else [structlog.processors.format_exc_info]),
            redact,
            renderers[chosen],
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**always)
    root = logging.getLogger()
    root.handlers[:] = [_StdlibHandler()]
    root.setLevel(max(logging.getLevelName(level.upper()), logging.WARNING))
    logging.getLogger("storaged").setLevel(level.upper())
