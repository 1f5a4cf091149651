"""Channels and calls for asyncio: as :mod:`tuner_core.transport.channel`, without blocking."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from tuner_core.errors import UnavailableError
from tuner_core.transport.channel import DEADLINE_S, translate
from tuner_core.transport.options import CLIENT_CHANNEL_OPTIONS, ConnectionOptions, read_pem


class AioConnection:
    """A channel to one server. Nothing is sent before the first call.

    Args:
        options: Where the server is.
        settings: gRPC channel settings besides the client's own.

    Raises:
        UsageError: A certificate, key or authority file cannot be read.
    """

    def __init__(self, options: ConnectionOptions, settings: tuple[tuple[str, Any], ...] = ()) -> None:
        self.address = options.address
        self._metadata = (("authorization", f"Bearer {options.token}"),) if options.token else ()
        arguments: list[tuple[str, Any]] = [*CLIENT_CHANNEL_OPTIONS, *settings]
        if options.secure:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=read_pem(options.tls_ca, "--tls-ca") if options.tls_ca else None,
                private_key=read_pem(options.tls_key, "--tls-key") if options.tls_key else None,
                certificate_chain=read_pem(options.tls_cert, "--tls-cert") if options.tls_cert else None,
            )
            if options.tls_name:
                arguments.append(("grpc.ssl_target_name_override", options.tls_name))
            self.channel = grpc.aio.secure_channel(options.address, credentials, options=arguments)
        else:
            self.channel = grpc.aio.insecure_channel(options.address, options=arguments)

    async def call(self, method: Callable[..., Any], request: Any, timeout_s: float = DEADLINE_S) -> Any:
        """One unary call with a deadline.

        Raises:
            TunerError: The exception of the status that came back; :class:`UnavailableError` when there is no server.
        """
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise translate(error, self.address, timeout_s) from None
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            raise self._closed(error) from None

    async def stream(self, method: Callable[..., Any], request: Any) -> AsyncIterator[Any]:
        """Messages of a server stream, without a deadline.

        Raises:
            TunerError: As :meth:`call`.
        """
        try:
            responses = method(request, metadata=self._metadata)
        except grpc.aio.UsageError as error:
            raise self._closed(error) from None
        try:
            async for response in responses:
                yield response
        except grpc.RpcError as error:
            raise translate(error, self.address, None) from None
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            raise self._closed(error) from None
        finally:
            responses.cancel()

    def _closed(self, error: BaseException) -> BaseException:
        """What to raise for a call that ended because its channel was closed, which gRPC reports as a cancellation."""
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            return error
        return UnavailableError(f"the connection to {self.address} was closed")

    async def close(self) -> None:
        """Close the channel; calls that run are cancelled."""
        await self.channel.close()
