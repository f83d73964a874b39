"""All targets, by name."""

from __future__ import annotations

from tests.fuzz.target import Target
from tests.fuzz.targets import documents, front, headers, http, iam, packets, peers, policies, stored

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (http, documents, policies, headers, front, iam, packets, peers, stored)
    for target in module.TARGETS
}
