"""Which network addresses a download may reach.

A URL from the internet may name any host, and a public name may resolve to a private address, so
the rule is applied to addresses, after resolution, at every hop: IP literals are checked before
a connection, names by a resolver that hands out permitted addresses only (the address checked is
the address connected to, so a DNS answer that changes in between changes nothing).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from dataclasses import dataclass, field

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

# Of IPv6 only this block is public unicast (RFC 4291 2.4): all others, among them NAT64 (RFC 6052,
# 8215), IPv4-compatible and IPv4-translated addresses (RFC 4291, 2765), may carry a private one.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Ranges that Python calls global although they can lead back into a private network: 6to4 (RFC
# 3056) and its relays (RFC 7526), Teredo and other protocol assignments (RFC 6890), documentation.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(net)
    for net in ("2002::/16", "2001::/23", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24")
)
_PORTS = (80, 443)
# A name whose last label is a number is an address to some resolvers: 0x7f.1, 0177.0.0.1.
_NUMBER = re.compile(r"0x[0-9a-f]*|\d+", re.IGNORECASE)


class BlockedAddress(ValueError):
    """The URL leads, or may lead, to an address that is not public."""


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 literal lies in public unicast space."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_global or ip.is_multicast or (ip.version == 6 and ip not in _GLOBAL_UNICAST):
        return False
    return not any(ip.version == net.version and ip in net for net in _NOT_PUBLIC)


@dataclass(frozen=True)
class AddressPolicy:
    """Public addresses on ports 80 and 443, plus the private hosts that are named."""

    allow_hosts: frozenset[str] = field(default_factory=frozenset)
    """Hosts, as ``host`` or ``host:port``, that may be reached wherever they lead."""

    def permits_host(self, host: str, port: int | None) -> bool:
        """Whether the host was named explicitly."""
        return host in self.allow_hosts or f"{host}:{port}" in self.allow_hosts

    def check(self, url: URL) -> None:
        """Refuses schemes, ports and IP literals outside the policy.

        Raises:
            BlockedAddress: naming what is not permitted.
        """
        if url.scheme not in ("http", "https"):
            raise BlockedAddress(f"scheme {url.scheme!r} is not http or https")
        host = url.raw_host or ""  # as it is connected to: digits of any script are plain here
        if not host:
            raise BlockedAddress("the URL names no host")
        if self.permits_host(host, url.port):
            return
        if url.port not in _PORTS:
            raise BlockedAddress(f"port {url.port} is not 80 or 443")
        try:
            literal = is_public(host)
        except ValueError:
            if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
                raise BlockedAddress(f"{host} is an address in an unusual notation") from None
            return  # a name: the resolver decides
        if not literal:
            raise BlockedAddress(f"{host} is not a public address")


class PublicResolver(AbstractResolver):
    """Resolves names to permitted addresses only."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of ``host``.

        Raises:
            BlockedAddress: when one of them is private. One bad answer condemns the name: a
                mixed answer is how rebinding attacks look.
        """
        # In the loop's own executor: libuv has four threads for it, which dead names would fill.
        found = await asyncio.get_running_loop().run_in_executor(None, _lookup, host, port, family)
        if not self._policy.permits_host(host, port):
            for entry in found:
                if not is_public(entry["host"]):
                    raise BlockedAddress(f"{host} resolves to {entry['host']}, not public")
        return found

    async def close(self) -> None:
        """Nothing is open."""


def _lookup(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    """What the name server says; waits for it."""
    answers = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
    return [
        ResolveResult(
            hostname=host, host=str(address[0]), port=port, family=found, proto=protocol,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for found, _, protocol, _, address in answers
    ]  # fmt: skip
