"""Which addresses a download may reach."""

import pytest
from yarl import URL

from infra.addresses import AddressPolicy, BlockedAddress, is_public

PRIVATE = [
    "127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1",
    "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
    "192.0.0.8", "224.0.0.1", "255.255.255.255",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_translated_and_multicast_addresses_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.org/a.jpg", "http://127.0.0.1/", "http://[::1]/",
     "http://[::ffff:10.0.0.1]/", "http://example.org:22/", "gopher://example.org/"],
)  # fmt: skip
def test_schemes_ports_and_private_literals_are_refused(url):
    with pytest.raises(BlockedAddress):
        AddressPolicy().check(URL(url))


def test_a_named_private_host_may_be_reached_on_its_port_only():
    policy = AddressPolicy(frozenset({"127.0.0.1:8080"}))
    policy.check(URL("http://127.0.0.1:8080/a.jpg"))
    with pytest.raises(BlockedAddress):
        policy.check(URL("http://127.0.0.1:8081/a.jpg"))
