"""One connection to a server: named, already running on the data directory, or started for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tuner_client.embedded import EmbeddedServer, connect_or_start
from tuner_core.errors import TunerError, UnavailableError
from tuner_core.transport import channel as transport
from tuner_core.transport.options import ConnectionOptions, read_token

if TYPE_CHECKING:
    import grpc

FIRST_CONTACT_S = 10.0


class Connection:
    """A server to call, and the local server's process when this connection started it.

    Args:
        options: The server that was named; None: the data directory's own, started when none runs.
        data_dir: The data directory.
        server_arguments: For a server that is started.

    Raises:
        TunerError: No server could be reached or started.
    """

    def __init__(self, options: ConnectionOptions | None, data_dir: Path, server_arguments: Sequence[str] = ()) -> None:
        self._named = options
        self._data_dir = data_dir
        self._arguments = tuple(server_arguments)
        self._server: EmbeddedServer | None = None
        self._channel: grpc.Channel | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        from tuner_core.proto.tuner.v1 import tuning_pb2

        options = self._named
        if options is None:
            address, self._server = connect_or_start(self._data_dir, self._arguments)
            options = ConnectionOptions(_reachable(address), token=read_token(None, os.environ))
        self._options = options
        self._channel = transport.open_channel(options)
        self._bind()
        # The first call of any connection is a cheap one with a short deadline: it tells a wrong port from a slow job.
        self.call(self.tuning.ListJobs, tuning_pb2.ListJobsRequest(limit=1), timeout_s=FIRST_CONTACT_S)

    def _bind(self) -> None:
        from tuner_core.proto.tuner.v1 import host_pb2_grpc, tuning_pb2_grpc

        self.tuning = tuning_pb2_grpc.TuningServiceStub(self._channel)
        self.host = host_pb2_grpc.HostServiceStub(self._channel)

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the server."""
        return self._options.address

    @property
    def named(self) -> bool:
        """Whether the user named the server."""
        return self._named is not None

    @property
    def embedded(self) -> bool:
        """Whether the server is this connection's own and ends with it."""
        return self._server is not None

    @property
    def lost(self) -> bool:
        """Whether the data directory's server is gone, and none has been started in its place."""
        return self._channel is None

    @property
    def channel(self) -> grpc.Channel:
        """The gRPC channel."""
        assert self._channel is not None
        return self._channel

    def call(self, method: Callable[..., Any], request: Any, timeout_s: float = transport.DEADLINE_S) -> Any:
        """One unary call; see :func:`tuner_core.transport.channel.call`."""
        self._check_not_lost()
        return transport.call(method, request, address=self.address, timeout_s=timeout_s)

    def stream(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """One server stream; see :func:`tuner_core.transport.channel.stream`."""
        self._check_not_lost()
        return transport.stream(method, request, address=self.address)

    def reopen(self) -> bool:
        """Look for the server again after a failed call, where it may have moved.

        A named server is where it was: its channel reconnects by itself. The data directory's server may have been
        replaced, or may have died and can be started again.

        Returns:
            Whether another server than before answers now.

        Raises:
            TunerError: None could be reached or started.
        """
        if self._named is not None or (self._server is not None and self._server.exit_code is None):
            return False
        self.close()
        self._open()
        return True

    def _check_not_lost(self) -> None:
        if self.lost:
            raise UnavailableError(f"the server at {self.address} is gone")

    def death(self, *, settle_s: float = 0.0) -> str | None:
        """How this connection's own server ended, None while it runs or when it is not ours.

        Args:
            settle_s: Wait that long for the end of a server of our own.
        """
        if self._server is None or not self._server.ends_within(settle_s):
            return None
        return self._server.describe_death()

    def close(self) -> None:
        """Close the channel; stop the server if it is ours."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._server is not None:
            server, self._server = self._server, None
            with contextlib.suppress(TunerError):
                server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reachable(address: str) -> str:
    """Where a server of this host answers that listens on ``address``, which may stand for every interface."""
    return address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
