"""Which addresses a download may reach."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop
from yarl import URL

from infra.addresses import AddressPolicy, BlockedAddress, PublicResolver, is_public

PRIVATE = [
    "127.255.255.254", "172.16.0.1", "198.18.0.1", "203.0.113.1", "240.0.0.1", "192.88.99.1", "::",
    "::127.0.0.1", "::ffff:0:127.0.0.1", "::ffff:100.64.0.1", "64:ff9b:1::a00:1", "fec0::1",
    "2001:0:7f00:1::", "2001:db8::1", "2001:10::1", "3fff::1", "5f00::1", "100::1", "ff02::1",
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


LITERALS = [
    "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "2130706433", "017700000001", "127.1", "127.0.1",
    "0", "0x", "127.0.0.1.", "127.0.0.0x1", "[::ffff:7f00:1]", "[::ffff:127.0.0.1]",
    "[0:0:0:0:0:ffff:7f00:0001]", "[::127.0.0.1]", "[64:ff9b::169.254.169.254]", "[2002:a00:1::]",
    "[fe80::1%25eth0]", "[2001:0:a00:1::]", "[::1\0]", "[::ffff:169.254.169.254\0]", "[::1\0%251]",
    "\uff11\uff12\uff17.0.0.1", "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021",
    "user:pass@127.0.0.1", "1.1.1.1@127.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", LITERALS)
def test_an_internal_address_is_refused_in_every_notation(host):
    with pytest.raises(ValueError, match=r"."):  # some are no URL at all, which is as good
        AddressPolicy().check(URL(f"http://{host}/a.jpg"))


@pytest.mark.parametrize("host", ["example.org", "1.1.1.1", "0x7f.example.org", "3com.net"])
def test_public_hosts_pass_the_check_of_the_url(host):
    AddressPolicy().check(URL(f"http://{host}/a.jpg"))


def name_server(monkeypatch, *answers):
    """A name server that answers differently each time."""
    left = list(answers)

    def lookup(host, port, family, kind, *_):
        return [(family, kind, 6, "", (each, port)) for each in left.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def test_every_answer_of_the_name_server_is_checked_and_one_bad_address_condemns_it(monkeypatch):
    answers = (
        ["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::ffff:a00:1"]
    )  # fmt: skip
    name_server(monkeypatch, *answers)

    async def resolved():
        resolver = PublicResolver(AddressPolicy())
        return [
            (await asyncio.gather(resolver.resolve("a.org", 80), return_exceptions=True))[0]
            for _ in answers
        ]

    good, changed, mixed, mapped = asyncio.run(resolved())
    assert [(entry["host"], entry["port"]) for entry in good] == [("93.184.216.34", 80)]
    assert all(isinstance(answer, BlockedAddress) for answer in (changed, mixed, mapped))


def test_a_name_of_this_machine_is_refused_unless_it_was_named():
    async def resolved(policy):
        return await PublicResolver(policy).resolve("localhost", 80)

    with pytest.raises(BlockedAddress, match=r"localhost resolves to"):
        asyncio.run(resolved(AddressPolicy()))
    found = asyncio.run(resolved(AddressPolicy(frozenset({"localhost"}))))
    assert {entry["host"] for entry in found} <= {"127.0.0.1", "::1"}
    assert found


def test_names_that_nobody_answers_for_are_asked_for_side_by_side(monkeypatch):
    asked = threading.Barrier(16)

    def lookup(*_):
        asked.wait(timeout=20)  # passes when all sixteen are here
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)

    async def resolved():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
        resolver = PublicResolver(AddressPolicy())
        names = [resolver.resolve(f"{number}.invalid", 80) for number in range(16)]
        return await asyncio.gather(*names, return_exceptions=True)

    found = uvloop.run(resolved())
    assert all(isinstance(each, socket.gaierror) for each in found)


def test_a_named_private_host_may_be_reached_on_its_port_only():
    policy = AddressPolicy(frozenset({"127.0.0.1:8080"}))
    policy.check(URL("http://127.0.0.1:8080/a.jpg"))
    with pytest.raises(BlockedAddress):
        policy.check(URL("http://127.0.0.1:8081/a.jpg"))
    for url in ("https://example.org/a.jpg", "https://example.org:80/a.jpg"):
        policy.check(URL(url))
    with pytest.raises(BlockedAddress, match="no host"):
        policy.check(URL("http:///a.jpg"))


def test_a_named_host_may_resolve_to_a_private_address_on_its_port_only(monkeypatch):
    def lookup(_, port, *__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)

    async def resolved(port):
        resolver = PublicResolver(AddressPolicy(frozenset({"intranet:8080"})))
        return await resolver.resolve("intranet", port)

    assert asyncio.run(resolved(8080))[0]["host"] == "10.0.0.1"
    with pytest.raises(BlockedAddress, match=r"intranet resolves to 10\.0\.0\.1"):
        asyncio.run(resolved(8081))
