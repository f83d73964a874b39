"""Conditions on the client's address, against Python's ``ipaddress``."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.s3.auth import conditions
from storaged.s3.auth.conditions import Condition, parse

NEAR = st.sampled_from(
    ("10.0.0.0", "10.0.0.7", "10.0.1.0", "192.0.2.1", "2001:db8::", "2001:db8::7", "::ffff:10.0.0.7")
)
ADDRESSES = NEAR | st.ip_addresses().map(str)


def _of_size(address: str, share: float) -> str:
    bits = ipaddress.ip_address(address).max_prefixlen
    return f"{address}/{round(bits * share)}"


NETWORKS = ADDRESSES | st.builds(_of_size, ADDRESSES, st.floats(0, 1))


def condition(operator: str, wanted: Sequence[str]) -> Condition:
    [found] = parse({operator: {"aws:SourceIp": list(wanted)}})
    return found


def holds(found: Condition, address: str, variables: bool = True) -> bool:
    return found.holds(lambda key: (address,), variables)


@given(st.lists(NETWORKS, min_size=1, max_size=6), ADDRESSES, st.booleans())
def test_an_address_is_in_one_of_the_networks(networks: list[str], client: str, variables: bool) -> None:
    address = ipaddress.ip_address(client)
    address = getattr(address, "ipv4_mapped", None) or address
    wanted = any(address in ipaddress.ip_network(network, strict=False) for network in networks)
    assert holds(condition("IpAddress", networks), client, variables) is wanted
    assert holds(condition("NotIpAddress", networks), client, variables) is not wanted


@pytest.mark.parametrize("client", ["", "client", "10.0.0.7 ", "10.0.0.256", "${aws:SourceIp}"])
def test_what_is_no_address_is_in_no_network(client: str) -> None:
    assert not holds(condition("IpAddress", ["0.0.0.0/0", "::/0"]), client)
    assert holds(condition("NotIpAddress", ["0.0.0.0/0", "::/0"]), client)


def test_networks_with_variables_are_looked_at_one_by_one() -> None:
    found = condition("IpAddress", ["192.0.2.0/24", "${aws:SourceIp}/32"])
    assert holds(found, "10.0.0.7")
    assert not holds(found, "10.0.0.7", variables=False)
    assert holds(found, "192.0.2.9", variables=False)


def test_a_request_does_not_look_at_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 KiB of a user's policies have 30,000 of them. To parse or compare each took a quarter of a second, in which
    all other requests waited."""
    found = condition("IpAddress", [f"10.{number >> 8}.{number & 255}.0/24" for number in range(2000)])
    monkeypatch.setattr(conditions, "_network", None)
    assert holds(found, "10.7.207.1")
    assert not holds(found, "10.7.208.1")
