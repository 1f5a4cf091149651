"""The ``tuner-server`` command."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from tuner_core.datadir import default_data_dir
from tuner_core.errors import ExitCode, TunerError, UsageError
from tuner_core.model import EvaluatorSettings
from tuner_server import __version__, cores, timeline
from tuner_server.config import (
    DEFAULT_LISTEN,
    DeviceSettings,
    ServerConfig,
    TlsFiles,
    device_settings,
    parse_shares,
    read_config_file,
)
from tuner_server.partitions.host import usable_cores

log = logging.getLogger(__name__)
_DEVICES = "tuner_server.devices"
_NOT_IN_FILE = frozenset({"config", "ready_fd", "exit_with_parent", "lazy", "debug"})


def _read_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Settings of the file become defaults, so that flags and the environment go before them."""
    if path is not None:
        known = {parameter.name for parameter in context.command.params if parameter.name} - _NOT_IN_FILE
        try:
            settings = read_config_file(path, frozenset(known | {"devices"}))
        except UsageError as error:
            _fail(error)
        context.meta[_DEVICES] = settings.pop("devices", None)
        if isinstance(settings.get("device"), str):  # one, or several as a list
            settings["device"] = [settings["device"]]
        if isinstance(settings.get("partitions"), list):  # as on the command line
            settings["partitions"] = ",".join(str(share) for share in settings["partitions"])
        context.default_map = settings
    return path


def _shares(_context: click.Context, _parameter: click.Parameter, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    try:
        shares = parse_shares(value)
    except ValueError:
        raise click.BadParameter("wants shares in percent, e.g. 50,25,25") from None
    if any(not 1 <= share <= 100 for share in shares):
        raise click.BadParameter("every share must be 1 to 100")
    return shares


@click.group(
    invoke_without_command=True,
    context_settings={"auto_envvar_prefix": "TUNER", "help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: tuner-server --sm-percent 25 --workers 4 --listen 127.0.0.1:50061",
)
@click.option(
    "--config", type=click.Path(path_type=Path), is_eager=True, callback=_read_config, help="Settings in YAML."
)
@click.option("--listen", default=DEFAULT_LISTEN, show_default=True, metavar="HOST:PORT", help="Port 0: any free one.")
@click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Store, jobs and logs.  [default: the user's data directory]"
)
@click.option(
    "--store", default="", metavar="URL", help="sqlite:///PATH or redis://HOST  [default: SQLite in the data directory]"
)
@click.option(
    "--device",
    multiple=True,
    help="auto, cpu, cpu:CORES, cuda, cuda:INDEX or cuda:UUID; may be repeated.  "
    "[default: auto: the GPUs of one model, else the CPU]",
)
@click.option("--sm-percent", type=click.IntRange(1, 100), help="Share of a device for each worker.  [default: 100]")
@click.option("--workers", type=click.IntRange(1, 48), help="Workers per device.  [default: as many as fit]")
@click.option(
    "--partitions", callback=_shares, metavar="P,P,...", help="Shares of each device's workers one by one: 50,25,25."
)
@click.option("--oversubscribe", is_flag=True, help="Allow shares that sum to more than 100 (rankings suffer).")
@click.option(
    "--mps", type=click.Choice(["auto", "external", "off"]), default="auto", show_default=True, help="CUDA MPS."
)
@click.option(
    "--pause-builds",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Stop search and build while a GPU measures for publication; auto: for short kernels and whole models.",
)
@click.option(
    "--cores",
    default="",
    metavar="K/N|LIST",
    help="Keep to the K-th of N parts of this host's cores, or to those listed (0-15,32).  [default: all]",
)
@click.option("--repartition/--no-repartition", default=True, help="Re-partition a free device for a job's share.")
@click.option("--number", type=click.IntRange(1), default=1, show_default=True, help="Calls per sample, at least.")
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Samples per measurement.")
@click.option(
    "--min-repeat-ms", type=click.IntRange(0, 10000), default=10, show_default=True, help="Length of a sample."
)
@click.option("--build-timeout-s", type=click.FloatRange(0.1), default=30.0, show_default=True)
@click.option("--run-timeout-s", type=click.FloatRange(0.1), default=10.0, show_default=True)
@click.option("--reference-timeout-s", type=click.FloatRange(0.1), default=60.0, show_default=True)
@click.option("--search-processes", type=click.IntRange(0, 256), default=0, help="0: by the number of cores.")
@click.option("--build-processes", type=click.IntRange(0, 256), default=0, help="0: by the number of cores.")
@click.option(
    "--lend-cores/--no-lend-cores", default=True, help="Build on the cores of a GPU's workers while these are idle."
)
@click.option("--batch", type=click.IntRange(0, 1024), default=0, help="Candidates per search batch; 0: by the device.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM certificate.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM key.")
@click.option("--tls-client-ca", type=click.Path(path_type=Path), help="Clients must show a certificate of this CA.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Lines of TOKEN TEAM; calls need one of them.")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback without TLS.")
@click.option("--reflection", is_flag=True, help="Offer gRPC server reflection.")
@click.option("--allow-volatile-store", is_flag=True, help="Accept a store that may forget.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a Perfetto/Chrome trace of search, build, measurement and commits.",
)
@click.option("--lazy", is_flag=True, help="Start worker processes at the first need.")
@click.option("--ready-fd", type=int, help="Write one JSON line there when up, or when it failed.")
@click.option("--exit-with-parent", type=int, default=0, metavar="PID", help="Stop when that parent process ends.")
@click.option("--debug", is_flag=True, help="Verbose log, tracebacks.")
@click.version_option(__version__, prog_name="tuner-server")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """Measure candidates for tuner-client on this host's GPUs, or on its CPU."""
    logging.basicConfig(
        level=logging.DEBUG if options["debug"] else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("asyncio").setLevel(logging.INFO)
    context.obj = options
    if context.invoked_subcommand is None:
        try:
            cores.keep_to(options["cores"])
            code = asyncio.run(_serve(_config(options), options["ready_fd"]))
        except TunerError as error:
            if options["debug"]:
                log.exception("failed")
            _fail(error, options["ready_fd"])
        sys.exit(code)


@cli.command(epilog="Example: tuner-server --sm-percent 25 --workers 4 check")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_context
def check(context: click.Context, as_json: bool) -> None:
    """Print what is found here (devices, TVM, store, one measurement); exit with 1 on a problem."""
    from tuner_server.check import run_checks, show

    try:
        cores.keep_to(context.obj["cores"])
        findings = asyncio.run(run_checks(_config(context.obj)))
    except TunerError as error:
        _fail(error)
    click.echo(show(findings, as_json=as_json))
    sys.exit(ExitCode.DONE if all(finding.ok for finding in findings) else ExitCode.FAILED)


def _config(options: dict[str, Any]) -> ServerConfig:
    cert, key = options["tls_cert"], options["tls_key"]
    if (cert is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    if options["tls_client_ca"] and cert is None:
        raise UsageError("--tls-client-ca needs --tls-cert and --tls-key")
    return ServerConfig(
        listen=options["listen"],
        data_dir=(options["data_dir"] or default_data_dir()).absolute(),
        store=options["store"],
        devices=_devices(options),
        repartition=options["repartition"],
        evaluator=EvaluatorSettings(options["number"], options["repeat"], options["min_repeat_ms"]),
        build_timeout_s=options["build_timeout_s"],
        run_timeout_s=options["run_timeout_s"],
        reference_timeout_s=options["reference_timeout_s"],
        search_processes=options["search_processes"],
        build_processes=options["build_processes"],
        batch=options["batch"],
        lend_cores=options["lend_cores"],
        tls=TlsFiles(cert, key, options["tls_client_ca"]) if cert is not None else None,
        token_file=options["token_file"],
        insecure=options["insecure"],
        reflection=options["reflection"],
        allow_volatile_store=options["allow_volatile_store"],
        lazy=options["lazy"],
        trace=options["trace"].absolute() if options["trace"] else None,
        exit_with_parent=options["exit_with_parent"],
    )


def _devices(options: dict[str, Any]) -> tuple[DeviceSettings, ...]:
    """The devices of the flags, or else those of the file, with the general settings for all."""
    if options["partitions"] and (options["sm_percent"] or options["workers"]):
        raise UsageError("--partitions stands for --sm-percent and --workers: give one or the other")
    defaults = DeviceSettings(
        sm_percent=options["sm_percent"] or 0,
        workers=options["workers"] or 0,
        partitions=options["partitions"],
        oversubscribe=options["oversubscribe"],
        mps=options["mps"],
        pause_builds=options["pause_builds"],
    )
    context = click.get_current_context(silent=True)
    listed = context.find_root().meta.get(_DEVICES) if context is not None else None
    if listed is not None and not options["device"]:
        return device_settings(listed, defaults)
    return tuple(replace(defaults, device=device) for device in options["device"] or ("auto",))


async def _serve(config: ServerConfig, ready_fd: int | None) -> ExitCode:
    from tuner_server.app import Server

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if config.exit_with_parent:
        _stop_with_parent(config.exit_with_parent)
    if config.trace is not None:
        timeline.start(config.trace)
    claim = cores.CoreClaim(usable_cores(), f"{config.listen}, pid {os.getpid()}")
    if claim.sharing:
        log.warning(
            "another tuner-server works on the same cores (%s): builds and measurements of both slow each other; "
            "give each its part, e.g. --cores 1/2 and --cores 2/2",
            "; ".join(claim.sharing),
        )
    server = Server(config)
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return ExitCode.DONE
    stopping_error = starting.exception()
    if stopping_error is not None:
        stopping.cancel()
        raise stopping_error
    _tell(ready_fd, {"address": server.address, "instance": server.instance})
    await stopping
    log.info("stopping")
    await server.stop()
    claim.release()
    timeline.stop()
    log.info("stopped")
    return ExitCode.DONE


def _stop_with_parent(parent: int) -> None:
    """SIGTERM to this process when its parent ends (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _tell(ready_fd: int | None, message: dict[str, str]) -> None:
    if ready_fd is not None:
        with os.fdopen(ready_fd, "w") as ready:
            ready.write(json.dumps(message) + "\n")


def _fail(error: TunerError, ready_fd: int | None = None) -> None:
    """Say the one line and exit with the error's code."""
    _tell(ready_fd, {"error": str(error)})
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def main() -> None:
    """Entry point."""
    cli.main(prog_name="tuner-server")


if __name__ == "__main__":
    main()
