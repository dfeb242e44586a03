"""Which addresses and hosts are asked, without a socket: each block of addresses, each way of writing one."""

from __future__ import annotations

import ipaddress

import pytest

from streams.indexing.addresses import is_address, is_allowed, is_loopback, is_name, is_public


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "100.63.255.255", "100.128.0.0", "169.253.0.1", "192.0.1.1", "192.88.98.1", "198.17.255.255",
        "198.20.0.1", "223.255.255.255", "2606:4700::1", "2001:200::1", "2001:db7::1", "2003::1", "3ffe::1",
        "::ffff:1.1.1.1", "64:ff9b::101:101", "2606:4700::5efd:7f00:1", "2606:4700::100:5efe:7f00:1",
    ],
)  # fmt: skip
def test_addresses_beside_the_blocks_that_are_never_asked_are_public(address: str) -> None:
    assert is_public(address) and is_allowed(address, ())


@pytest.mark.parametrize(
    "address",
    [
        "0.255.255.255", "10.255.255.255", "100.64.0.0", "100.127.255.255", "127.255.255.255", "169.254.0.0",
        "172.31.255.255", "192.0.0.9", "192.0.0.10", "192.0.0.255", "192.0.2.1", "192.88.99.1", "192.168.255.255",
        "198.18.0.0", "198.19.255.255", "224.0.1.1", "233.252.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "2001:1::1", "2001:3::1", "2001:4:112::1", "2001:20::1", "2001:30::1", "2001:1ff::1", "2001:db8:ffff::1",
        "2002:101:101::1", "3fff::1", "3fff:fff::1", "4000::1", "1000::1", "100::1", "5f00::1", "64:ff9b:1::101:101",
        "64:ff9b::1:101:101", "::1.1.1.1", "fc00::1", "fe80::1", "fec0::1", "ff0e::1", "::ffff:192.168.0.1",
        "64:ff9b::c0a8:1", "64:ff9b::ffff:ffff", "2606:4700::5efe:101:101", "2606:4700::200:5efe:101:101",
        "1.1.1.1%1", "2606:4700::1%lo",
    ],
)  # fmt: skip
def test_addresses_that_are_not_of_the_open_internet_are_not_public(address: str) -> None:
    assert not is_public(address) and not is_allowed(address, ())


@pytest.mark.parametrize(
    ("address", "network", "allowed"),
    [
        ("10.2.3.4", "10.2.0.0/16", True),
        ("10.3.0.1", "10.2.0.0/16", False),
        ("::ffff:10.2.3.4", "10.2.0.0/16", True),
        ("64:ff9b::a02:304", "10.2.0.0/16", True),
        ("fd00::1", "fd00::/8", True),
        ("fe80::1", "fe80::/10", True),
        ("fe80::1%lo", "fe80::/10", False),
        ("10.2.3.4", "::/0", False),
        ("fd00::1", "0.0.0.0/0", False),
        ("no address", "0.0.0.0/0", False),
        ("", "0.0.0.0/0", False),
        ("1.1.1.1", "10.2.0.0/16", True),
    ],
)
def test_a_network_inside_is_asked_where_it_is_allowed_and_nothing_beside_it(
    address: str, network: str, allowed: bool
) -> None:
    other = ipaddress.ip_network("203.0.113.0/24")
    assert is_allowed(address, [other, ipaddress.ip_network(network)]) is allowed


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("pictures.test", True),
        ("pictures.test.", True),
        ("localhost", True),
        ("a_b.x-y.test", True),
        ("3.test", True),
        ("1e5", True),
        ("0x7g", True),
        ("x0x7f", True),
        ("." .join(["a" * 49] * 5) + ".ab", True),
        ("." .join(["a" * 49] * 5) + ".abcd", False),
        ("127.1", False),
        ("0x7f.1", False),
        ("pictures.0x7F", False),
        ("pictures.0X7f", False),
        ("pictures.0x", False),
        ("pictures.1.", False),
        ("2130706433", False),
        ("", False),
        (".", False),
        ("a..test", False),
        (".test", False),
        ("a.test..", False),
        ("a b.test", False),
        ("a%2e.test", False),
        ("größe.test", False),
        ("-.test", False),
        ("[::1]", False),
    ],
)  # fmt: skip
def test_a_name_is_what_no_library_reads_as_an_address(host: str, named: bool) -> None:
    assert is_name(host) is named


def test_an_address_is_one_in_its_full_spelling() -> None:
    assert [is_address(host) for host in ("127.0.0.1", "::1", "127.1", "0x7f.0.0.1", "a.test", "")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_only_this_machine_reaches_what_listens_on_loopback() -> None:
    assert [is_loopback(one) for one in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::", "10.0.0.1")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="localhost"):
        is_loopback("localhost")
