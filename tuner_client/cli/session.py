"""Options that every command has, and what they give a command to work with."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.core import ParameterSource

from tuner_client.cli.connecting import connection_flags, server_options
from tuner_client.cli.ending import environment_server
from tuner_client.sharding.addresses import is_fleet
from tuner_core.datadir import default_data_dir
from tuner_core.errors import UsageError
from tuner_core.transport.options import ConnectionOptions

if TYPE_CHECKING:
    from rich.console import Console

    from tuner_client.api import Client
    from tuner_client.render.live import LiveProgress
    from tuner_client.render.plain import PlainProgress

_PLAIN_WIDTH = 120


@dataclass
class Session:
    """One run of a command.

    Attributes:
        connection: The server that was named, or None.
        data_dir: The data directory.
        as_json: Print one JSON document on standard output and nothing else there.
        debug: Show what libraries print.
        reconnect_s: For how long a lost server is waited for.
        servers: Every server that was named.
        options_of: How to connect to each of several servers; what it gives takes an address.
        connecting: TLS or token options were given, which are for a server that is named.
    """

    connection: ConnectionOptions | None
    data_dir: Path
    as_json: bool
    debug: bool
    reconnect_s: float
    servers: tuple[str, ...] = ()
    options_of: Callable[[Sequence[str]], Callable[[str], ConnectionOptions]] = lambda _: ConnectionOptions
    connecting: bool = False

    def __post_init__(self) -> None:
        # Progress goes to duplicates: descriptors 1 and 2 are the log's while libraries work.
        self._out = _duplicate(sys.stderr if self.as_json else sys.stdout)

    @functools.cached_property
    def console(self) -> Console:
        """Where people look: standard output, or standard error when that is for JSON."""
        from rich.console import Console

        terminal = self._out.isatty() and os.environ.get("TERM") != "dumb"
        width = None if terminal or "COLUMNS" in os.environ else _PLAIN_WIDTH
        return Console(file=self._out, width=width, highlight=False, force_terminal=terminal, legacy_windows=False)

    @functools.cached_property
    def progress(self) -> LiveProgress | PlainProgress:
        """The live view on a terminal, plain lines elsewhere."""
        if self.console.is_terminal:
            from rich.console import Console

            from tuner_client.render.live import LiveProgress

            return LiveProgress(self.console if isinstance(self.console, Console) else Console())
        from tuner_client.render.plain import PlainProgress

        return PlainProgress(self._out)

    def client(self, server_arguments: Sequence[str] = (), *, lines: bool = False) -> Client:
        """A client for what was asked; close it, or use it as a context.

        Args:
            server_arguments: For a local server that is started.
            lines: Say what goes on without a terminal too: for commands that take long, not for listings.
        """
        from tuner_client.api import Client
        from tuner_client.progress import Silent

        if not self.servers and self.connecting:
            raise UsageError("TLS and token options are for a server that is named: give --server HOST:PORT")
        if self.several:
            raise UsageError(f"this command talks to one server, but {', '.join(self.servers)} were given")
        return Client(
            self.connection,
            data_dir=self.data_dir,
            progress=self.progress if lines or self.console.is_terminal else Silent(),
            reconnect_s=self.reconnect_s,
            quiet=self.quiet,
            server_arguments=server_arguments,
        )

    def each_client(self) -> Iterator[tuple[Client, str]]:
        """A client for each server that was named, with its address; else one for the data directory's own."""
        if not self.several:
            yield self.client(), self.connection.address if self.connection else ""
            return
        from tuner_client.api import Client
        from tuner_client.sharding.addresses import expand

        for options in expand(self.servers, self.options_of(self.servers))[0]:
            yield Client(options, data_dir=self.data_dir, reconnect_s=self.reconnect_s), options.address

    @property
    def several(self) -> bool:
        """Whether more than one server was named, or a name that may stand for several."""
        return is_fleet(self.servers)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Around work in libraries that print: their output goes to the log, unless ``--debug``."""
        from tuner_client.logfile import output_to_log

        if self.debug:
            yield
            return
        with output_to_log(self.data_dir):
            yield

    def show(self, renderable: Any) -> None:
        """Print for people; nothing under ``--json``."""
        if self.as_json:
            return
        if self.console.is_terminal:
            self.console.print(renderable)
        else:
            with self.console.capture() as captured:
                self.console.print(renderable)
            self._out.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
        self._out.flush()

    def reserve_stdout(self) -> None:
        """Keep standard output for data from now on, as ``--json`` does."""
        self.as_json = True
        self._out = _duplicate(sys.stderr)

    def close_view(self) -> None:
        """Take a live view off the terminal."""
        close = getattr(self.progress, "close", None)
        if close is not None:
            close()


def _duplicate(stream: TextIO) -> TextIO:
    try:
        number = os.dup(stream.fileno())
    except (OSError, ValueError):
        return stream
    # A terminal that lacks a character gets a question mark, not a traceback.
    return os.fdopen(number, "w", encoding=stream.encoding, errors="replace", buffering=1)


def _on_command_line(*names: str) -> bool:
    context = click.get_current_context()
    return any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in names)


def session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every command; the function gets a :class:`Session` as ``session``."""

    @functools.wraps(command)
    def run(
        server: tuple[str, ...],
        data_dir: Path | None,
        as_json: bool,
        debug: bool,
        reconnect_s: float,
        tls: bool,
        tls_ca: tuple[str, ...],
        tls_cert: tuple[str, ...],
        tls_key: tuple[str, ...],
        tls_name: tuple[str, ...],
        token_file: tuple[str, ...],
        insecure: bool,
        **rest: Any,
    ) -> Any:
        servers = list(server) or environment_server()
        connecting = _on_command_line("tls", "tls_ca", "tls_cert", "tls_key", "tls_name", "token_file")
        options_of = functools.partial(
            server_options,
            tls=tls,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_name=tls_name,
            token_file=token_file,
            insecure=insecure,
        )
        connection = None
        if servers and not is_fleet(servers):
            connection = options_of(servers)(servers[0])
        folder = (data_dir or default_data_dir()).absolute()
        session = Session(connection, folder, as_json, debug, reconnect_s, tuple(servers), options_of, connecting)
        try:
            return command(session=session, **rest)
        finally:
            session.close_view()

    path = click.Path(path_type=Path)
    first = [
        click.option(
            "--server",
            multiple=True,
            metavar="HOST:PORT",
            help="Repeatable where it says so.  [env: TUNER_SERVER; default: a local server]",
        ),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
        click.option(
            "--data-dir", type=path, envvar="TUNER_DATA_DIR", metavar="DIR", help="Of the local server, and the log."
        ),
    ]
    last = [
        click.option(
            "--reconnect-s",
            type=click.FloatRange(0, 86400),
            default=60.0,
            show_default=True,
            metavar="SECONDS",
            help="Wait so long for a lost server.",
        ),
        click.option("--debug", is_flag=True, help="Show tracebacks and library output."),
    ]
    decorators: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [*first, connection_flags, *last]
    decorated: Callable[..., Any] = run
    for add in reversed(decorators):
        decorated = add(decorated)
    return decorated
