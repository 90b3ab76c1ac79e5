"""The network interface on which a rank can be reached by its peers.

gloo takes the one that this host's name resolves to. On many machines that is a loopback address
(Debian writes `127.0.1.1 name` into /etc/hosts), or nothing: then ranks on several hosts look for
each other on their own machines. Whoever can reach the launcher's store can be reached that way.
"""

import fcntl
import socket
import struct
import sys
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_NAME_BYTES = 16  # IFNAMSIZ


def interface_towards(host: str, port: int) -> str | None:
    """Return the name of the interface that leads to a host; None where it cannot be told.

    Linux only; of an interface with several IPv4 addresses, only the first is known. No packet is
    sent. Raises nothing.
    """
    if sys.platform != "linux":
        return None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            mine = str(probe.getsockname()[0])
        names = [name for _, name in socket.if_nameindex()]
    except OSError:  # no such name, or no way there: what is built on it says so
        return None
    if family == socket.AF_INET6:
        return _ipv6_interfaces().get(socket.inet_pton(family, mine.partition("%")[0]).hex())
    return next((name for name in names if _ipv4_address(name) == mine), None)


def _ipv4_address(name: str) -> str | None:
    request = struct.pack("256s", name.encode()[: _NAME_BYTES - 1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


def _ipv6_interfaces() -> dict[str, str]:
    """Return the interface of each address, in hex."""
    table = Path("/proc/net/if_inet6")
    lines = table.read_text().splitlines() if table.exists() else []
    return {line.split()[0]: line.split()[-1] for line in lines}
