"""The break-glass of object lock: only a signed order, on a gateway that allows it, ends a lock before its time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from storaged.admin.ports import Services
from storaged.cli.buckets import bucket
from storaged.cluster import issuing
from storaged.cluster.unlock import UNLOCK_LABEL, UnlockOrder, sign_order, verify_order, words_in
from storaged.errors import AccessDenied, NoSuchVersion, UnlockRefused
from storaged.node.version_services import offer_versions
from storaged.objects.code.lock import COMPLIANCE
from storaged.objects.records import Lock
from tests.unit.test_objects_lock import DAY_MS, Locked

NOW_MS = 1_800_000_000_000


def signed(authority: issuing.Authority, **other: Any) -> str:
    fields = {
        "cluster": "c1", "bucket": "b", "key": "k", "version": "v" * 32, "reason": "court", "until_ms": NOW_MS + 1,
    }  # fmt: skip
    return sign_order(UnlockOrder(**fields | other), authority.administration)


def versionless(authority: issuing.Authority) -> str:
    """An order that is signed and names no version."""
    text = json.loads(signed(authority))["order"].replace("v" * 32, "")
    signature = authority.administration.sign(UNLOCK_LABEL + text.encode())
    return json.dumps({"order": text, "signature": signature.hex()})


@pytest.fixture
def authority(tmp_path: Path) -> issuing.Authority:
    return issuing.create_authority(tmp_path / "authority", "c1")


def test_an_order_counts_in_its_cluster_until_its_end(authority: issuing.Authority, tmp_path: Path) -> None:
    public = authority.administration.public_key()
    order = verify_order(signed(authority), public, "c1", NOW_MS)
    assert (order.bucket, order.key, order.reason) == ("b", "k", "court")
    assert words_in(signed(authority)) == ("b", f"end the lock of version {'v' * 32} of b/k")
    other = issuing.create_authority(tmp_path / "other", "c1")
    changed = json.loads(signed(authority))
    changed["order"] = changed["order"].replace('"b"', '"x"')
    for document, now_ms, said in (
        (signed(other), NOW_MS, "not signed"),
        (json.dumps(changed), NOW_MS, "not signed"),
        (signed(authority, cluster="c2"), NOW_MS, "for cluster 'c2'"),
        (signed(authority), NOW_MS + 1, "expired"),
        (versionless(authority), NOW_MS, "the id of one version"),
        ("{}", NOW_MS, "not what"),
        ("[", NOW_MS, "not what"),
        (json.dumps({"order": "{}", "signature": "zz"}), NOW_MS, "not what"),
    ):
        with pytest.raises(UnlockRefused, match=said):
            verify_order(document, public, "c1", now_ms)
    with pytest.raises(UnlockRefused, match="the id of one version"):
        signed(authority, version="")


def test_a_gateway_takes_no_order_unless_its_configuration_says_so(authority: issuing.Authority) -> None:
    plane: Any = SimpleNamespace(clock=SimpleNamespace(wall_ms=lambda: NOW_MS))
    own: Any = SimpleNamespace(administration=authority.administration.public_key(), cluster="c1")
    services: Any = SimpleNamespace()
    offer_versions(services, plane, own, allowed=False)
    with pytest.raises(UnlockRefused, match="break_glass"):
        services.verify_unlock(signed(authority))
    offer_versions(services, plane, own, allowed=True)
    assert services.verify_unlock(signed(authority)).version == "v" * 32
    assert Services.__dataclass_fields__["verify_unlock"].default is None


@pytest.mark.virtual_time
async def test_a_version_whose_lock_was_ended_goes_and_only_that_one() -> None:
    made = Locked()
    lock = Lock(COMPLIANCE, made.now_ms + DAY_MS, hold=True)
    kept, other = await made.kept(lock), await made.kept(lock, b"other")
    services: Any = SimpleNamespace()
    offer_versions(services, made.plane, SimpleNamespace(), allowed=True)  # type: ignore[arg-type]
    with pytest.raises(NoSuchVersion):
        await services.unlock(made.bucket, b"key", kept[:-1] + ("A" if kept[-1] != "A" else "B"))
    await services.unlock(made.bucket, b"key", kept)
    assert await made.lock(kept) is None
    await made.objects.delete(made.bucket, b"key", version_id=kept)
    with pytest.raises(AccessDenied):
        await made.objects.delete(made.bucket, b"key", version_id=other, bypass_governance=True)
    await made.objects.close()


def test_sign_unlock_wants_the_words(authority: issuing.Authority) -> None:
    asked = ["sign-unlock", str(authority.directory), "--bucket", "b", "--key", "k", "--version", "v1", "--reason", "r"]
    words = "end the lock of version v1 of b/k"
    done = CliRunner().invoke(bucket, [*asked, "--words", words])
    assert done.exit_code == 0, done.output
    assert words_in(done.output) == ("b", words)
    wrong = CliRunner().invoke(bucket, [*asked, "--words", "yes"])
    assert isinstance(wrong.exception, UnlockRefused)
    late = CliRunner().invoke(bucket, [*asked, "--words", words, "--within", "8d"])
    assert late.exit_code != 0
