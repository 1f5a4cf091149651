"""From ``--server`` values to one set of connection options per instance."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Sequence

from tuner_core.errors import UnavailableError, UsageError
from tuner_core.transport.options import ConnectionOptions, split_address

DNS = "dns:///"


def is_fleet(servers: Sequence[str]) -> bool:
    """Whether these values name several instances, or a name that may stand for several."""
    return len(servers) > 1 or any(server.startswith(DNS) for server in servers)


def expand(
    servers: Sequence[str], options_for: Callable[[str], ConnectionOptions]
) -> tuple[list[ConnectionOptions], list[str]]:
    """One entry per instance: ``HOST:PORT`` is one, ``dns:///NAME:PORT`` every address that the name has.

    Args:
        servers: Values of ``--server``.
        options_for: How to connect to an address.

    Returns:
        The instances in their order, and one line for each that was named twice.

    Raises:
        UsageError: A value is no address.
        UnavailableError: A name has no address.
    """
    found: dict[str, ConnectionOptions] = {}
    notes = []
    for server in servers:
        for options in _expand_one(server, options_for):
            if options.address in found:
                notes.append(f"{options.address} was named twice; it is used once")
            found[options.address] = options
    return list(found.values()), notes


def _expand_one(server: str, options_for: Callable[[str], ConnectionOptions]) -> list[ConnectionOptions]:
    if not server.startswith(DNS):
        return [options_for(server)]
    name = server.removeprefix(DNS)
    host, port = split_address(name)
    base = options_for(name)
    if base.secure and not base.tls_name:  # the certificate bears the name, not the address
        base = dataclasses.replace(base, tls_name=host)
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"--server {server}: the name has no address ({error.strerror}); check it") from None
    addresses = sorted({str(entry[4][0]) for entry in entries})
    if not addresses:
        raise UsageError(f"--server {server}: the name has no address")
    return [
        dataclasses.replace(base, address=f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
        for address in addresses
    ]
