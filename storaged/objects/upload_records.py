"""Values of registers: the records of open multipart uploads and of their parts. Pure."""

from __future__ import annotations

from storaged.objects.records import Lock, PartEntry
from storaged.wire import Message


class UploadRecord(Message, frozen=True):
    """A multipart upload: Open -> Completing(pinned) -> Done(result), or Open | Completing -> Aborted. It has one DEK,
    wrapped for (bucket id, key, upload id).

    ``meta``: sealed SealedMeta given at Create. ``result``: sealed answer of Complete, kept for retries. ``pinned``:
    while completing, the encoded Version that is being made; its parts have a reference here even when their rows are
    replaced. ``pinned_sequence``: the object register's sequence at the pin, so that a resumed Complete can see that
    nothing happened since. ``request_digest``: of the Complete, keyed by the upload's DEK (33 bytes; 32 in old records,
    which are not keyed, and are rewritten when they are used). ``changed_ms``: when the state last changed.
    ``lock``: that the client asked for. ``initiator``: who created the upload; empty in older records: ``owner``.
    """

    upload_id: bytes
    state: str
    owner: str
    created_ms: int
    bucket_key: int
    context_id: bytes
    wrapped_key: bytes
    meta: bytes
    checksum_algorithm: str = ""
    checksum_type: str = ""
    request_digest: bytes = b""
    result: bytes = b""
    pinned: bytes = b""
    pinned_sequence: int = 0
    changed_ms: int = 0
    lock: Lock | None = None
    initiator: str = ""


class PartRecord(Message, frozen=True):
    """One uploaded part of an open upload; every attempt has its own data id. ``sealed``: SealedPart and the part's
    ETag under the upload's DEK.
    """

    entry: PartEntry
    modified_ms: int
    sealed: bytes
