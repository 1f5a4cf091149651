"""Where a server is and how to prove who one is, as a value. Nothing here imports gRPC."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuner_core.errors import UsageError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
KEEPALIVE_INTERVAL_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 10_000

_SIZES: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

# A silent server (stopped process, cut network) is noticed by pings, not after TCP's minutes.
CLIENT_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)

# What a server must allow so that those pings do not end the connection (gRPC's default is one in five minutes), and
# a port that another server listens on is refused instead of shared.
SERVER_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_INTERVAL_MS // 3),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        UsageError: It is neither.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or "/" in host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"'{address}' is not a server address; give HOST:PORT, e.g. 127.0.0.1:50061")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether traffic to ``host`` (a name or an address) stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class ConnectionOptions:
    """How to connect to one server. TLS is used when ``tls`` is set or any of its files is given.

    Attributes:
        address: ``HOST:PORT``.
        tls: Use TLS even without a file: the system's certificate authorities.
        tls_ca: PEM file of the authorities that sign the server's certificate.
        tls_cert, tls_key: PEM files of the client's own certificate and key (mutual TLS).
        tls_name: Name that the server's certificate must bear, when it is not the host of ``address``.
        token: Sent as ``authorization: Bearer TOKEN`` with every call.
        insecure: Send a token without TLS to another machine all the same.

    Raises:
        UsageError: No address, half a key pair, or a token that would cross the network in the clear.
    """

    address: str
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_name: str = ""
    token: str = ""
    insecure: bool = False

    def __post_init__(self) -> None:
        host, _ = split_address(self.address)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("a client certificate needs both --tls-cert and --tls-key")
        if self.token and not (self.token.isascii() and self.token.isprintable()):
            raise UsageError("the token holds characters that a token cannot have")
        if self.token and not self.secure and not self.insecure and not is_loopback(host):
            raise UsageError(
                f"a token for {self.address} would cross the network unencrypted; use --tls or --tls-ca FILE "
                "(or --insecure on a network you trust)"
            )

    def __repr__(self) -> str:
        return f"ConnectionOptions({self.address!r}, secure={self.secure}, token={'set' if self.token else 'none'})"

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.tls_ca is not None or self.tls_cert is not None


def read_token(path: Path | None, environment: Mapping[str, str]) -> str:
    """The token of a file, else of ``TUNER_TOKEN``, else none.

    Raises:
        UsageError: The file cannot be read or is empty.
    """
    if path is None:
        return environment.get("TUNER_TOKEN", "").strip()
    token = read_pem(path, "--token-file").decode(errors="replace").strip()
    if not token:
        raise UsageError(f"the token file {path} is empty")
    return token


def read_pem(path: Path, flag: str) -> bytes:
    """Bytes of a file that ``flag`` names.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}), given with {flag}") from None
