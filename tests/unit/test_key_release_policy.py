"""Who may be given a bucket's key: the whole matrix of policy, certificate, bucket and time."""

from __future__ import annotations

from itertools import product

import pytest

from storaged.cluster.policy import (
    BUCKET_COUNTRIES_RULE,
    CERTIFICATE_RULE,
    CLUSTER_COUNTRIES_RULE,
    CLUSTER_JURISDICTIONS_RULE,
    EU_LAW,
    POLICY_RULE,
    RELEASE_RULES,
    VALIDITY_RULE,
    KeyHolder,
    Policy,
    release_refusal,
)
from storaged.cluster.ports import PeerIdentity
from storaged.errors import JurisdictionRefused

COUNTRIES = ["FR", "DE", "HU", "CH", "fr", ""]
SELECTIONS = [(), ("FR",), ("FR", "DE")]
FROM_MS, UNTIL_MS = 1_000, 2_000


def expected(cluster, jurisdictions, bucket, country, jurisdiction, now_ms) -> str:
    """Written out a second time, in sets, so that the function is not its own witness."""
    inside_eu = {"FR", "DE", "HU"}
    if now_ms not in range(FROM_MS, UNTIL_MS):
        return VALIDITY_RULE
    if country not in (inside_eu & set(cluster) if cluster else inside_eu):
        return CLUSTER_COUNTRIES_RULE
    if jurisdiction not in (inside_eu & set(jurisdictions) if jurisdictions else inside_eu):
        return CLUSTER_JURISDICTIONS_RULE
    return BUCKET_COUNTRIES_RULE if bucket and country not in bucket else ""


@pytest.mark.parametrize("now_ms", [0, FROM_MS - 1, FROM_MS, UNTIL_MS - 1, UNTIL_MS, 10 * UNTIL_MS])
@pytest.mark.parametrize("cluster", SELECTIONS)
@pytest.mark.parametrize("jurisdictions", SELECTIONS)
def test_a_key_is_released_only_where_every_rule_agrees(cluster, jurisdictions, now_ms):
    policy = Policy.of(cluster, jurisdictions)
    for bucket, country, jurisdiction in product(SELECTIONS, COUNTRIES, COUNTRIES):
        found = release_refusal(policy, KeyHolder(country, jurisdiction, FROM_MS, UNTIL_MS), bucket, now_ms)
        assert (found.rule if found else "") == expected(cluster, jurisdictions, bucket, country, jurisdiction, now_ms)
        assert found is None or (found.rule in RELEASE_RULES and found.reason)


def test_a_gateway_of_germany_under_hungarian_law_gets_no_key_of_a_french_bucket():
    found = release_refusal(Policy(), KeyHolder("DE", "HU", FROM_MS, UNTIL_MS), ("FR",), FROM_MS)
    assert str(found) == "bucket countries: this gateway is in DE, and the bucket is bound to FR"


def test_what_is_not_known_is_refused():
    holder = KeyHolder("FR", "FR", FROM_MS, UNTIL_MS)
    assert release_refusal(None, holder, (), FROM_MS).rule == POLICY_RULE
    assert release_refusal(Policy(), None, (), FROM_MS).rule == CERTIFICATE_RULE
    assert release_refusal(Policy(()), holder, (), FROM_MS).rule == CLUSTER_COUNTRIES_RULE
    assert release_refusal(Policy(EU_LAW, ()), holder, (), FROM_MS).rule == CLUSTER_JURISDICTIONS_RULE
    assert release_refusal(Policy(), holder, "FRDE", FROM_MS).rule == BUCKET_COUNTRIES_RULE
    assert release_refusal(Policy(), holder, ("US",), FROM_MS).rule == BUCKET_COUNTRIES_RULE


def test_a_policy_may_narrow_the_jurisdictions_of_operators_too():
    policy = Policy.of((), ("FR",))
    policy.admit(PeerIdentity("n1", "DE", "fra1", "a", ("storage",), "FR", "c"))
    with pytest.raises(JurisdictionRefused, match="HU is not among the jurisdictions"):
        policy.admit(PeerIdentity("n1", "DE", "fra1", "a", ("storage",), "HU", "c"))
    assert policy != Policy()
    with pytest.raises(JurisdictionRefused):
        Policy(EU_LAW, ["US"])
    with pytest.raises(JurisdictionRefused):
        Policy(EU_LAW, "FR")
