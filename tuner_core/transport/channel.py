"""Channels with tokens, and calls that end in this product's exceptions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core writes to a terminal that is ours

import grpc

from tuner_core.errors import ConflictError, TunerError, UnavailableError, from_status
from tuner_core.transport.options import CLIENT_CHANNEL_OPTIONS, ConnectionOptions, read_pem

DEADLINE_S = 30.0


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _CallDetailsWithMetadata(_CallDetails, grpc.ClientCallDetails):
    """What gRPC wants an interceptor to pass on."""


class _BearerToken(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the token to every call. Call credentials would do the same, but gRPC refuses them without TLS."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _with_token(self, details: Any) -> _CallDetailsWithMetadata:
        return _CallDetailsWithMetadata(
            details.method,
            details.timeout,
            [*(details.metadata or ()), self._entry],
            details.credentials,
            getattr(details, "wait_for_ready", None),
            getattr(details, "compression", None),
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)


def open_channel(options: ConnectionOptions) -> grpc.Channel:
    """A channel to the server; nothing is sent before the first call.

    Raises:
        UsageError: A certificate, key or authority file cannot be read.
    """
    settings: list[tuple[str, Any]] = list(CLIENT_CHANNEL_OPTIONS)
    if options.secure:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=read_pem(options.tls_ca, "--tls-ca") if options.tls_ca else None,
            private_key=read_pem(options.tls_key, "--tls-key") if options.tls_key else None,
            certificate_chain=read_pem(options.tls_cert, "--tls-cert") if options.tls_cert else None,
        )
        if options.tls_name:
            settings.append(("grpc.ssl_target_name_override", options.tls_name))
        channel = grpc.secure_channel(options.address, credentials, options=settings)
    else:
        channel = grpc.insecure_channel(options.address, options=settings)
    if options.token:
        channel = grpc.intercept_channel(channel, _BearerToken(options.token))
    return channel


def call(method: Callable[..., Any], request: Any, *, address: str, timeout_s: float = DEADLINE_S) -> Any:
    """One unary call with a deadline.

    Args:
        method: A stub's method.
        request: Its message.
        address: The server's address, for the text of an error.
        timeout_s: Deadline.

    Raises:
        TunerError: The exception of the status that came back; :class:`UnavailableError` when there is no server.
    """
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise translate(error, address, timeout_s) from None


def stream(method: Callable[..., Any], request: Any, *, address: str, timeout_s: float | None = None) -> Iterator[Any]:
    """Messages of a server stream. Without a deadline (a job takes hours), keepalive pings notice a lost server.

    Closing the generator cancels the call.

    Raises:
        TunerError: As :func:`call`.
    """
    responses = method(request, timeout=timeout_s)
    try:
        yield from responses
    except grpc.RpcError as error:
        raise translate(error, address, timeout_s) from None
    finally:
        responses.cancel()


def translate(error: grpc.RpcError, address: str, timeout_s: float | None) -> TunerError:
    """The product's exception, with one line of text, for what gRPC raised."""
    code: grpc.StatusCode = error.code()
    details = " ".join((error.details() or "").split())
    if name := _error_name(error):  # the server was reached, and says itself what is wrong
        return from_status(code.name, details, name)
    if code == grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"cannot reach a tuner-server at {address}: {_why_unreachable(details)}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        within = f" within {timeout_s:g} s" if timeout_s else " in time"
        return from_status(code.name, f"the server at {address} did not answer{within}; is it a tuner-server, and up?")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ConflictError(
            f"what listens at {address} is not a tuner-server, or one of another version; check host and port"
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return TunerError(f"the message is larger than a tuner-server takes ({details})")
    if code == grpc.StatusCode.CANCELLED:
        return UnavailableError(f"the server at {address} ended the call")
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and not details:
        return TunerError(f"the server at {address} failed without saying why; see its log")
    return from_status(code.name, details)


def _error_name(error: grpc.RpcError) -> str:
    """The exception class that the server names in its trailing metadata, or nothing."""
    call: Any = error  # what a stub raises is also a grpc.Call
    trailers = call.trailing_metadata() or ()
    return next((str(value) for key, value in trailers if key == "tuner-error"), "")


def _why_unreachable(details: str) -> str:
    """gRPC's details in words, and what to do."""
    low = details.lower()
    if "connection refused" in low:
        return "connection refused; check host and port, or start one with: tuner-server"
    if "dns" in low or "name resolution" in low or "domain name" in low:
        return "the host name is unknown; check it"
    if "ssl" in low or "tls" in low or "certificate" in low or "handshake" in low:
        return "the TLS handshake failed; check --tls-ca, --tls-cert and that both sides use TLS"
    if "http" in low or "trying to connect" in low or "settings frame" in low or "protocol" in low:
        return "something else answers there (wrong port, or it expects TLS: --tls-ca FILE); check the port"
    if "timed out" in low or "timeout" in low:
        return "no answer; check host, port and firewall"
    if "socket closed" in low or "connection reset" in low or "goaway" in low or "broken pipe" in low:
        return "the connection was closed (wrong port, TLS on one side only, or the server stopped)"
    return f"{details[:160] or 'no reason given'}; check host and port"
