"""Where the farm may be sent by others: checks of URLs that tenants give, and of the addresses behind their names.

A name is looked up once for each use; what is checked is the address, and the connection goes to that very address
(`Destination`), so that a name which answers differently the second time leads nowhere. Redirects are the caller's to
refuse.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from urllib.parse import SplitResult, urlsplit

Networks = tuple[IPv4Network | IPv6Network, ...]

LONGEST_URL = 2_000
PRINTABLE = re.compile(r"[\x21-\x7e]+")
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
"""The last label of what resolvers take for an address: 2130706433, 0x7f000001, 0177.0.0.1, 127.1."""
LOCAL_NAMES = ("localhost", "local", "internal", "home.arpa")
PORTS = {"http": 80, "https": 443}

# Python's own `is_global` misses these (shared and translated space), depending on its patch level.
NOT_PUBLIC: Networks = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4",
        "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32",
        "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/9",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Destination:
    """A checked address to connect to, with the name that stands in the Host header and in the certificate."""

    url: str
    host: str
    name: str


def networks_of(text: str | None) -> Networks:
    """`10.1.0.0/16, ::1/128` as networks. Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in (text or "").split(",") if part.strip())


def check_url(url: str, also: Networks = ()) -> SplitResult:
    """The parts of an https URL that does not lead inside by its very spelling. `also`: networks that are allowed
    beside the public ones, and over http too. Raises ValueError with what would be right; asks no resolver."""
    if len(url) > LONGEST_URL or not PRINTABLE.fullmatch(url) or "\\" in url:
        raise ValueError(f"must be a URL of at most {LONGEST_URL} printable ASCII characters, percent-encoded")
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and also):
        raise ValueError("must begin with https://")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("must have neither user, password nor fragment")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("must have a port within 1..65535 or none")
    host = (parts.hostname or "").removesuffix(".")
    if ":" in host or NUMBER.fullmatch(host.rpartition(".")[2]):
        check_address(_literal(host), parts.scheme, also)
    elif len(host) > 253 or not all(LABEL.fullmatch(label) for label in host.split(".")):
        raise ValueError("must name a host: letters, digits and dashes between dots, others in punycode")
    elif not also and ("." not in host or host.endswith(tuple(f".{name}" for name in LOCAL_NAMES))):
        raise ValueError("must name a host of the public internet")
    return parts


def check_address(address: str, scheme: str, also: Networks = ()) -> None:
    """Raises ValueError unless an address (as a resolver writes it) is public, or within `also`."""
    ip = ipaddress.ip_address(address)
    if any(ip in network for network in also):
        return
    inside = any(ip in network for network in NOT_PUBLIC) or ip.is_multicast or not ip.is_global
    if inside or (isinstance(ip, IPv6Address) and ip.is_site_local):
        raise ValueError("leads to an address that is not public")
    if scheme != "https":
        raise ValueError("must begin with https://")


def destination(url: str, addresses: Iterable[str], also: Networks = ()) -> Destination:
    """The one address to connect to, of those that the URL's name was looked up to. Every one of them is checked.

    Raises ValueError.
    """
    parts = check_url(url, also)
    found = list(dict.fromkeys(addresses))
    if not found:
        raise ValueError("leads to no address")
    for address in found:
        check_address(address, parts.scheme, also)
    name = (parts.hostname or "").removesuffix(".")
    port = parts.port or PORTS[parts.scheme]
    chosen = f"[{found[0]}]" if ":" in found[0] else found[0]
    pinned = parts._replace(netloc=f"{chosen}:{port}")
    return Destination(pinned.geturl(), parts.netloc, name)


def _literal(host: str) -> str:
    try:
        written = str(ipaddress.ip_address(host))
    except ValueError:
        written = ""
    if not written or (written != host and ":" not in host):
        raise ValueError("must write an address in full: four decimal numbers between dots, or IPv6 in brackets")
    return written
