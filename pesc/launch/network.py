"""This machine's place among several: by which address and interface it reaches the meeting point, and whether it is that point."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Place:
    """address: this machine's, as the others reach it; None when it cannot be told.  hosts: whether the meeting point is here; None: unsure."""

    address: str | None
    hosts: bool | None

    @property
    def interface(self) -> str | None:
        """Name of the network interface that has the address (Linux, IPv4); None for loopback or when there is none."""
        if self.address is None or ipaddress.ip_address(self.address).is_loopback:
            return None
        return next((name for _, name in socket.if_nameindex() if _address_of(name) == self.address), None)


def find_place(host: str, port: int) -> Place:
    """Ask the routing table how `host` is reached; sends nothing.

    Whoever reaches it from its own address is it.  Several "machines" that are one (localhost) cannot be told apart: then torchrun tries.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = probe.getsockname()[0]
    except OSError:
        return Place(None, None)
    if not ipaddress.ip_address(address).is_loopback:
        return Place(address, address == target[0])
    if host == "localhost" or _is_address(host):
        return Place(address, None)
    return Place(_outward_address(), True)  # only this machine calls itself so by a loopback address (Debian's 127.0.1.1)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _outward_address() -> str | None:
    """This machine's address towards everything else, None where it has no route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address of documentation: nobody has it, and nothing is sent
            return probe.getsockname()[0]
    except OSError:
        return None


def interface_environment(interface: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that bind gloo and NCCL to an interface; those that the user has set stay."""
    return {name: interface for name in INTERFACE_VARIABLES if interface and name not in environment}


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None
