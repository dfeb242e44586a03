"""Addresses of servers in settings: a login inside is passed to the server only, and never shown in a message."""

from __future__ import annotations

from urllib.parse import urlsplit

_ENDS_OF_A_HOST = frozenset("/?#[]")


def checked_endpoint(address: str, *, schemes: tuple[str, ...]) -> str:
    """The address, if it parses unambiguously into login and host.

    In a password, a plain `/`, `?` or `#` ends the host for a parser, so that the rest would be read as a port or host
    name, and shown in messages. Raises `ValueError`, whose text repeats nothing of the address.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in schemes:
        raise ValueError(f"an address begins with {' or '.join(f'{name}://' for name in schemes)}")
    if _ENDS_OF_A_HOST.intersection(rest.rpartition("@")[0]):
        raise ValueError(
            "there is a '/', '?', '#' or bracket before an '@': percent-encode what is no letter or digit in a login "
            "('/' is %2F, '@' is %40), or leave the login out and set it by the variables of its own"
        )
    try:
        _ = urlsplit(address).port
    except ValueError:
        raise ValueError("behind the login there is no host:port, the port a number up to 65535") from None
    return address


def shown_endpoint(address: str) -> str:
    """A checked address without its login and without options, which may contain one."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
