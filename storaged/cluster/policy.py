"""Decides which countries a node may be in, and under whose law its operator may be. Pure.

A place is admitted when EU law applies there without further argument: the 27 member states, and the six French
outermost regions with ISO codes of their own (Articles 349 and 355(1) TFEU). Not admitted are overseas countries and
territories (Annex II TFEU: NC, PF, GL, CW ...), members of the EEA, and countries that merely have an adequacy
decision. AX is part of Finland, but outside several EU acts by Protocol 2 of its accession: it is refused.

Everything fails closed: what is missing, unknown, mistyped or lower-case is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from storaged.cluster.layout import Layout
from storaged.cluster.ports import PeerIdentity
from storaged.errors import JurisdictionRefused


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


EU_MEMBERS: Final = _codes("AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK")
EU_LAW_TERRITORIES: Final = _codes("GF GP MQ MF RE YT")
EU_LAW: Final = EU_MEMBERS | EU_LAW_TERRITORIES
"""The most that a policy can admit; a policy only narrows it."""

OVERSEAS: Final = _codes("AW BL BQ CW GL NC PF PM SX TF WF")
"""Overseas countries and territories of EU members (Annex II TFEU): associated with the Union, not under its law."""

ISO_3166_1: Final = _codes(
    "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA"
    " CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA"
    " GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP"
    " KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS"
    " MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS"
    " RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW"
    " TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW"
)
"""The officially assigned alpha-2 codes."""


def outside_eu_law(country: object) -> str:
    """Why a country is not under EU law; empty when it is."""
    if country in EU_LAW:
        return ""
    if not country:
        return "no country is named"
    if not isinstance(country, str) or country not in ISO_3166_1:
        return f"{country!r} is not an ISO 3166-1 country code in capitals"
    if country in OVERSEAS:
        return f"{country} is an overseas country or territory: EU law does not apply there"
    return f"{country} is outside the European Union"


class Policy:
    """The countries where nodes may be, and the jurisdictions that their operators may be under: parts of
    :data:`EU_LAW`, never more.

    Immutable. An empty selection admits no node; configuration and layouts use :meth:`of`, where empty means all of EU
    law.
    """

    __slots__ = ("countries", "jurisdictions")

    countries: frozenset[str]
    jurisdictions: frozenset[str]

    def __init__(self, countries: Iterable[str] = EU_LAW, jurisdictions: Iterable[str] = EU_LAW) -> None:
        """Raises JurisdictionRefused that names the first country outside EU law."""
        for name, listed in (("countries", countries), ("jurisdictions", jurisdictions)):
            if isinstance(listed, str):
                raise JurisdictionRefused(f"a policy is a list of {name}, not the text {listed!r}")
            chosen = frozenset(listed)
            for country in sorted(chosen, key=repr):
                if reason := outside_eu_law(country):
                    raise JurisdictionRefused(f"The policy cannot allow {country!r}: {reason}.")
            object.__setattr__(self, name, chosen)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a policy is immutable")

    @classmethod
    def of(cls, countries: Iterable[str], jurisdictions: Iterable[str] = ()) -> Policy:
        """As configuration writes it: an empty list means all of EU law."""
        first, second = (
            given if isinstance(given, str) else tuple(given) or EU_LAW for given in (countries, jurisdictions)
        )
        return cls(first, second)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and (self.countries, self.jurisdictions) == (
            other.countries,
            other.jurisdictions,
        )

    def __hash__(self) -> int:
        return hash((self.countries, self.jurisdictions))

    def __repr__(self) -> str:
        narrowed = "" if self.jurisdictions == EU_LAW else f", {sorted(self.jurisdictions)}"
        return f"Policy({sorted(self.countries)}{narrowed})"

    def refusal(self, country: object) -> str:
        """Why a country is not admitted; empty when it is."""
        reason = outside_eu_law(country)
        if not reason and country not in self.countries:
            allowed = ", ".join(sorted(self.countries)) or "none"
            reason = f"{country} is not among the countries allowed here: {allowed}"
        return reason

    def jurisdiction_refusal(self, jurisdiction: object) -> str:
        """Why an operator under this law is not admitted; empty when it is."""
        reason = outside_eu_law(jurisdiction)
        if not reason and jurisdiction not in self.jurisdictions:
            allowed = ", ".join(sorted(self.jurisdictions)) or "none"
            reason = f"{jurisdiction} is not among the jurisdictions allowed here: {allowed}"
        return reason

    def admit(self, peer: PeerIdentity) -> None:
        """An ``Admission``: checks that the node is in an allowed country, and its operator under an allowed law.

        Raises JurisdictionRefused with the reason.
        """
        if reason := self.refusal(peer.country):
            raise JurisdictionRefused(f"Node {peer.name!r} is not certified inside the policy: {reason}.")
        if reason := self.jurisdiction_refusal(peer.jurisdiction):
            raise JurisdictionRefused(
                f"The operator of node {peer.name!r} is not certified to be inside the policy: {reason}."
            )


def policy_of(layout: Layout) -> Policy:
    """The policy that a signed layout states; all of EU law for a layout without countries or jurisdictions.

    Raises JurisdictionRefused for a layout that names a country outside EU law.
    """
    return Policy.of(layout.countries, layout.jurisdictions)


class KeyHolder(NamedTuple):
    """A gateway that asks for keys, as its certificate describes it. Valid while ``valid_from_ms <= now <
    valid_until_ms`` (wall clock, milliseconds since 1970).
    """

    country: str
    jurisdiction: str
    valid_from_ms: int
    valid_until_ms: int
    revoked: bool = False

    def valid_at(self, now_ms: int) -> bool:
        return self.valid_from_ms <= now_ms < self.valid_until_ms


class ReleaseRefusal(NamedTuple):
    """The rule that refuses a key (one of RELEASE_RULES), and the reason."""

    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


POLICY_RULE, CERTIFICATE_RULE, VALIDITY_RULE = "policy", "certificate", "certificate validity"
CLUSTER_COUNTRIES_RULE, CLUSTER_JURISDICTIONS_RULE, BUCKET_COUNTRIES_RULE = (
    "cluster countries",
    "cluster jurisdictions",
    "bucket countries",
)
RELEASE_RULES: Final = (
    POLICY_RULE,
    CERTIFICATE_RULE,
    VALIDITY_RULE,
    CLUSTER_COUNTRIES_RULE,
    CLUSTER_JURISDICTIONS_RULE,
    BUCKET_COUNTRIES_RULE,
)
"""All rules, in the order in which they are checked."""


def release_refusal(
    policy: Policy | None, holder: KeyHolder | None, bucket_countries: Iterable[str], now_ms: int
) -> ReleaseRefusal | None:
    """Decides whether a gateway may have the key of a bucket: None if so, else the first rule that refuses. Fails
    closed.

    ``policy`` None: it is unknown, or could not be read. ``holder`` None: no certificate is known. ``bucket_countries``
    come from the authenticated bucket record; with none named the bucket is no narrower than the cluster. They bind the
    country of the gateway; the cluster's policy binds its operator's jurisdiction. ``now_ms``: wall clock, milliseconds
    since 1970.
    """
    if policy is None:
        return ReleaseRefusal(POLICY_RULE, "the cluster's policy is not known")
    if holder is None:
        return ReleaseRefusal(CERTIFICATE_RULE, "this gateway's certificate is not known")
    if holder.revoked:
        return ReleaseRefusal(VALIDITY_RULE, "this gateway's certificate is revoked")
    if not holder.valid_at(now_ms):
        when = "is not valid yet" if now_ms < holder.valid_from_ms else "has expired"
        return ReleaseRefusal(VALIDITY_RULE, f"this gateway's certificate {when}")
    if reason := policy.refusal(holder.country):
        return ReleaseRefusal(CLUSTER_COUNTRIES_RULE, reason)
    if reason := policy.jurisdiction_refusal(holder.jurisdiction):
        return ReleaseRefusal(CLUSTER_JURISDICTIONS_RULE, reason)
    if isinstance(bucket_countries, str):
        return ReleaseRefusal(
            BUCKET_COUNTRIES_RULE, f"the bucket's countries are a list, not the text {bucket_countries!r}"
        )
    wanted = frozenset(bucket_countries)
    if wanted and holder.country not in wanted:
        return ReleaseRefusal(
            BUCKET_COUNTRIES_RULE,
            f"this gateway is in {holder.country}, and the bucket is bound to {', '.join(sorted(wanted))}",
        )
    return None
