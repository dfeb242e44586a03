"""Which addresses and hosts a URL from outside may lead to. Pure: no function here resolves or connects."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NEVER_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "100.64.0.0/10",  # carrier-grade NAT; some clouds answer for credentials in it
        "169.254.0.0/16",  # link-local, metadata services
        "192.0.0.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "198.18.0.0/15",  # benchmarks
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NEVER_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, benchmarks, ORCHID
        "2001:db8::/32",
        "2002::/16",  # 6to4: leads to any IPv4 address
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_public(address: str) -> bool:
    """Whether an address lies in the open internet, also when an IPv4 address hides inside an IPv6 one.

    Python's own `is_global` follows the registries of its release; what must never be connected to is listed here too,
    so that the answer does not depend on the release. `ValueError` if this is no address.
    """
    if "%" in address:
        return False  # a zone exists for addresses of a link only
    parsed = _unwrapped(ipaddress.ip_address(address))
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.is_global and not any(parsed in network for network in _NEVER_V4)
    if parsed not in _GLOBAL_UNICAST or any(parsed in network for network in _NEVER_V6):
        return False
    return parsed.is_global and (int(parsed) >> 32) & 0xFFFFFFFF not in _ISATAP


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach what listens there. `ValueError` if this is no address."""
    return ipaddress.ip_address(address).is_loopback


def is_allowed(address: str, inside: Sequence[Network]) -> bool:
    """Whether an address is public, or in a network `inside` that is allowed nonetheless. False if it is none."""
    try:
        if is_public(address):
            return True
        parsed = _unwrapped(ipaddress.ip_address(address))
    except ValueError:
        return False
    return "%" not in address and any(parsed in network for network in inside)


def is_name(host: str) -> bool:
    """Whether `host` can only be a name of the DNS, never a way of writing an address.

    A last label that is a number (`127.1`, `0x7f.1`, `2130706433`) makes C libraries read the whole as an address.
    """
    labels = host.removesuffix(".").split(".")
    if not host.isascii() or not all(labels) or len(host) > 253:
        return False
    if any(not (part.isalnum() or part.replace("-", "").replace("_", "").isalnum()) for part in labels):
        return False
    return not _is_number(labels[-1])


def is_address(host: str) -> bool:
    """Whether `host` is an address in its one full spelling."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _unwrapped(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_number(label: str) -> bool:
    if label.isdigit():
        return True
    return label[:2].lower() == "0x" and all(digit in "0123456789abcdefABCDEF" for digit in label[2:])
