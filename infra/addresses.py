"""Which network addresses a download may reach.

A URL from the internet may name any host, and a public name may resolve to a private address, so
the rule is applied to addresses, after resolution, at every hop: IP literals are checked before
a connection, names by a resolver that hands out permitted addresses only (the address checked is
the address connected to, so a DNS answer that changes in between changes nothing).
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

# Ranges that Python calls global although they can lead back into a private network:
# NAT64 (RFC 6052, 8215), 6to4 (RFC 3056), Teredo (RFC 4380), IETF protocol assignments (RFC 6890).
_TRANSLATED = tuple(
    ipaddress.ip_network(net)
    for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "192.0.0.0/24")
)
_PORTS = (80, 443)


class BlockedAddress(ValueError):
    """The URL leads, or may lead, to an address that is not public."""


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 literal lies in public unicast space."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if not ip.is_global or ip.is_multicast:
        return False
    return not any(ip.version == net.version and ip in net for net in _TRANSLATED)


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
        host = url.host or ""
        if not host:
            raise BlockedAddress("the URL names no host")
        if self.permits_host(host, url.port):
            return
        if url.port not in _PORTS:
            raise BlockedAddress(f"port {url.port} is not 80 or 443")
        try:
            literal = is_public(host)
        except ValueError:
            return  # a name: the resolver decides
        if not literal:
            raise BlockedAddress(f"{host} is not a public address")


class PublicResolver(AbstractResolver):
    """Resolves names to permitted addresses only."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of ``host``.

        Raises:
            BlockedAddress: when one of them is private. One bad answer condemns the name: a
                mixed answer is how rebinding attacks look.
        """
        found = await self._inner.resolve(host, port, family)
        if not self._policy.permits_host(host, port):
            for entry in found:
                if not is_public(entry["host"]):
                    raise BlockedAddress(f"{host} resolves to {entry['host']}, not public")
        return found

    async def close(self) -> None:
        """Closes the resolver underneath."""
        await self._inner.close()
