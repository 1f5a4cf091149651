"""The server that a client talks to: when to connect, what it offers, how to close."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tuner_client.progress import Progress, Silent
from tuner_core.datadir import default_data_dir, read_holder
from tuner_core.transport.options import ConnectionOptions

if TYPE_CHECKING:
    from tuner_client.connection import Connection
    from tuner_core.proto.tuner.v1 import host_pb2
    from tuner_core.store.remote import RemoteStore

HOST_TIMEOUT_S = 120.0
RECONNECT_S = 60.0


class ServerClient:
    """One server and its host. It connects at the first call that needs the server.

    Args: As of :class:`tuner_client.api.Client`.

    Raises (any method):
        TunerError: With one line saying what is wrong and what to do.
    """

    def __init__(
        self,
        server: str | ConnectionOptions | None = None,
        *,
        data_dir: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        reconnect_s: float = RECONNECT_S,
        quiet: Callable[[], AbstractContextManager[Any]] = nullcontext,
        server_arguments: Sequence[str] = (),
    ) -> None:
        self._options = ConnectionOptions(server) if isinstance(server, str) else server
        self._data_dir = Path(data_dir) if data_dir is not None else default_data_dir()
        self._progress: Progress = progress or Silent()
        self._reconnect_s = reconnect_s
        self._quiet = quiet
        self._server_arguments = list(server_arguments)
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a server of our own saves its jobs and ends."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    @property
    def connection(self) -> Connection:
        """The connection, opened now when it was not."""
        if self._connection is None:
            from tuner_client.connection import Connection

            running = read_holder(self._data_dir) if self._options is None else self._options
            what = f"connecting to {running.address}" if running else "starting the local server"
            with self._progress.step(what):
                self._connection = Connection(self._options, self._data_dir, self._server_arguments)
        return self._connection

    @property
    def store(self) -> RemoteStore:
        """The server's record store."""
        return self._store_for("")

    def _store_for(self, team: str) -> RemoteStore:
        from tuner_core.store.remote import RemoteStore

        connection = self.connection
        return RemoteStore(connection.channel, address=connection.address, team=team)

    def host(self, sm_percent: int | None = None) -> host_pb2.GetHostResponse:
        """What the server offers and is doing; ``target_json`` and ``sm_count`` are those of the share."""
        from tuner_core.proto.tuner.v1 import host_pb2

        request = host_pb2.GetHostRequest(sm_percent=sm_percent or 0)
        connection = self.connection
        with self._progress.step("asking the server for its target"):
            response: host_pb2.GetHostResponse = connection.call(connection.host.GetHost, request, HOST_TIMEOUT_S)
        return response

    def drain(self) -> list[str]:
        """Let the server finish what it holds and take no more.

        Returns:
            The jobs it still holds.
        """
        from tuner_core.proto.tuner.v1 import host_pb2

        return list(self.connection.call(self.connection.host.Drain, host_pb2.DrainRequest()).running_jobs)
