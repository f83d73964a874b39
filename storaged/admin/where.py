"""The document of ``storaged where``."""

from __future__ import annotations

import dataclasses
from typing import Any

from storaged.objects.where import Whereabouts


def where_document(bucket: str, found: Whereabouts) -> dict[str, Any]:
    """The document of ``storaged where``: one row a fragment, for ``blocks`` blocks of the part from ``block`` on.

    ``racks_may_fail`` counts failure domains, of whatever kind.
    """
    fragments = [
        {
            "part": run.part,
            "block": run.first,
            "blocks": run.count,
            "profile": run.profile,
            "kind": run.kind,
            **dataclasses.asdict(fragment),
        }
        for run in found.runs
        for fragment in run.fragments
    ]
    return {
        "bucket": bucket,
        "key": found.key.decode("utf-8", "replace"),
        "size": found.size,
        "domain": found.domain_kind,
        "disks_may_fail": found.disks_may_fail,
        "racks_may_fail": found.domains_may_fail,
        "replicas_may_fail": found.replicas_may_fail,
        "whole": found.whole,
        "whole_because": found.stays,
        "fragments": fragments,
        "replicas": [dataclasses.asdict(replica) for replica in found.replicas],
    }
