"""The jurisdiction matrix: who is inside, who is not, and that every doubt is a refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.cluster.policy import EU_LAW, EU_LAW_TERRITORIES, EU_MEMBERS, ISO_3166_1, OVERSEAS, Policy, outside_eu_law
from storaged.cluster.ports import PeerIdentity
from storaged.errors import JurisdictionRefused

INSIDE = {
    *" AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE GP MQ GF RE YT MF ".strip().split(  # noqa: E501
        " "
    )
}
"""Written out a second time on purpose: the table under test must not be its own witness."""


def test_there_are_27_members_6_territories_and_249_codes() -> None:
    assert (len(EU_MEMBERS), len(EU_LAW_TERRITORIES), len(ISO_3166_1)) == (27, 6, 249)
    assert EU_LAW < ISO_3166_1
    assert OVERSEAS < ISO_3166_1 - EU_LAW


@pytest.mark.parametrize("country", sorted(ISO_3166_1))
def test_exactly_the_places_under_eu_law_are_admitted(country: str) -> None:
    assert bool(Policy().refusal(country)) == (country not in INSIDE)


@pytest.mark.parametrize(
    "country", ["NC", "PF", "PM", "WF", "BL", "TF", "GB", "CH", "NO", "US", "AX", "GL", "MC", "UA", "VA"]
)
def test_near_misses_are_refused(country: str) -> None:
    assert Policy().refusal(country)


@pytest.mark.parametrize(
    "country", [None, "", "fr", "Fr", "FRA", " FR", "FR ", "EU", "UK", "EL", "F", "FR\n", b"FR", 33, "ＦＲ", ("FR",)]
)
def test_what_is_missing_or_mistyped_is_refused_with_a_reason(country: object) -> None:
    assert Policy().refusal(country)


@given(st.text(max_size=4))
def test_no_other_text_is_ever_admitted(text: str) -> None:
    assert bool(Policy().refusal(text)) == (text not in INSIDE)


@given(st.sets(st.sampled_from(sorted(EU_LAW))), st.sampled_from(sorted(ISO_3166_1)))
def test_a_policy_admits_what_it_names_and_nothing_else(chosen: set[str], country: str) -> None:
    assert bool(Policy(chosen).refusal(country)) == (country not in chosen)


@pytest.mark.parametrize("countries", [["FR", "US"], ["fr"], ["FR", None], "FR", ["FR", ""]])
def test_a_policy_with_a_country_outside_eu_law_cannot_be_made(countries: object) -> None:
    with pytest.raises(JurisdictionRefused):
        Policy(countries)  # type: ignore[arg-type]


def test_a_policy_of_no_country_admits_nobody() -> None:
    assert all(Policy([]).refusal(country) for country in ISO_3166_1)


def test_configuration_that_names_no_country_means_all_of_eu_law() -> None:
    assert Policy.of(()) == Policy()


def test_a_policy_cannot_be_changed_after_it_was_made() -> None:
    with pytest.raises(AttributeError):
        Policy().countries = ISO_3166_1


def peer(country: str, jurisdiction: str) -> PeerIdentity:
    return PeerIdentity("n1", country, "s", "r", ("storage",), jurisdiction, "c1")


def test_a_node_in_the_eu_under_an_operator_outside_is_refused() -> None:
    with pytest.raises(JurisdictionRefused, match=r"operator.*US is outside"):
        Policy().admit(peer("FR", "US"))


def test_an_operator_from_another_member_state_may_run_nodes_in_a_narrower_policy() -> None:
    Policy(["FR"]).admit(peer("FR", "DE"))
    with pytest.raises(JurisdictionRefused, match="DE is not among"):
        Policy(["FR"]).admit(peer("DE", "FR"))


def test_a_certificate_that_names_no_operator_is_refused() -> None:
    with pytest.raises(JurisdictionRefused, match="no country is named"):
        Policy().admit(PeerIdentity("n1", "FR", "s", "r", ("storage",)))


def test_the_reason_tells_overseas_territories_from_third_countries_and_from_typing_errors() -> None:
    assert "overseas" in outside_eu_law("NC")
    assert "outside the European Union" in outside_eu_law("CH")
    assert "not an ISO 3166-1" in outside_eu_law("fr")
