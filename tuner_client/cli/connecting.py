"""TLS and token options: one value for every server that is named, or one for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tuner_core.errors import UsageError
from tuner_core.transport.options import ConnectionOptions, read_token, split_address

_DNS = "dns:///"


class _OneFromEnvironment(click.types.StringParamType):
    """Text of which the environment holds one value, though the option is repeatable."""

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]


def connection_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the function gets them as ``tls``, ``insecure``, and tuples under the names of the others."""
    text = _OneFromEnvironment()
    options = [
        click.option("--tls", is_flag=True, help="Use TLS with the system's certificate authorities."),
        click.option(
            "--tls-ca",
            type=text,
            multiple=True,
            envvar="TUNER_TLS_CA",
            metavar="[SERVER=]FILE",
            help="Authorities to trust; PEM. This and the next four: SERVER=... is for that --server only; repeatable.",
        ),
        click.option(
            "--tls-cert",
            type=text,
            multiple=True,
            envvar="TUNER_TLS_CERT",
            metavar="[SERVER=]FILE",
            help="Own certificate; PEM.",
        ),
        click.option(
            "--tls-key", type=text, multiple=True, envvar="TUNER_TLS_KEY", metavar="[SERVER=]FILE", help="Its key; PEM."
        ),
        click.option(
            "--tls-name",
            type=text,
            multiple=True,
            metavar="[SERVER=]NAME",
            help="Name in the server's certificate, if another.",
        ),
        click.option(
            "--token-file",
            type=text,
            multiple=True,
            metavar="[SERVER=]FILE",
            help="Token to show the server.  [env: TUNER_TOKEN]",
        ),
        click.option("--insecure", is_flag=True, help="Send the token without TLS on a network you trust."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def server_options(
    servers: Sequence[str],
    *,
    tls: bool,
    insecure: bool,
    environment: Mapping[str, str] = os.environ,
    **given: Sequence[str],
) -> Callable[[str], ConnectionOptions]:
    """How to connect to each of the servers.

    Args:
        servers: Values of ``--server``.
        tls, insecure: For all of them.
        environment: Where a token may be.
        given: ``VALUE`` or ``SERVER=VALUE`` each, by the option's name with underscores.

    Returns:
        The options of an address.

    Raises:
        UsageError: A value is for a server that was not named, or there are two for the same.
    """
    names = {server.removeprefix(_DNS) for server in servers}
    values = {option: _by_server(f"--{option.replace('_', '-')}", entries, names) for option, entries in given.items()}

    def options_for(address: str) -> ConnectionOptions:
        def value(option: str) -> str | None:
            of_option = values.get(option, {})
            return of_option.get(address, of_option.get(""))

        def path(option: str) -> Path | None:
            found = value(option)
            return Path(found) if found else None

        return ConnectionOptions(
            address,
            tls=tls,
            tls_ca=path("tls_ca"),
            tls_cert=path("tls_cert"),
            tls_key=path("tls_key"),
            tls_name=value("tls_name") or "",
            token=read_token(path("token_file"), environment),
            insecure=insecure,
        )

    return options_for


def _by_server(flag: str, entries: Sequence[str], names: set[str]) -> dict[str, str]:
    """Value by server; under the empty name the one for all others."""
    found: dict[str, str] = {}
    for entry in entries:
        server, value = _split(entry)
        if server and server not in names:
            raise UsageError(f"{flag} {entry}: {server} is not among the servers; name it as --server does")
        if server in found:
            whom = f"for {server}" if server else "for all servers; SERVER=VALUE is for one of them"
            raise UsageError(f"{flag} is given twice {whom}")
        found[server] = value
    return found


def _split(entry: str) -> tuple[str, str]:
    server, equals, value = entry.partition("=")
    try:
        split_address(server.removeprefix(_DNS))
    except UsageError:
        return "", entry
    return (server.removeprefix(_DNS), value) if equals else ("", entry)
