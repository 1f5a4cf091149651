"""The command itself: its subcommands, loaded when they are asked for, and how every one of them ends."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from tuner_client.cli.ending import fail, interrupted
from tuner_core.compiler.tvm_setup import leave_torch_out
from tuner_core.errors import ExitCode, TunerError, UsageError

_COMMANDS = {  # name: (module, one-line help, so that a list of commands imports none of them)
    "tune": ("tune", "Tune a model's operators, and build it."),
    "jobs": ("jobs", "List jobs."),
    "watch": ("jobs", "Follow a job to its end."),
    "cancel": ("jobs", "End a job; what it measured stays."),
    "resume": ("jobs", "Go on with a stopped, cancelled or failed job."),
    "query": ("query", "Look records up."),
    "export": ("transfer", "Write records as TVM JSONDatabase folders."),
    "import": ("transfer", "Read a TVM JSONDatabase folder."),
    "build": ("build", "Build a model from records, without measuring."),
    "servers": ("servers", "What a server offers and is doing."),
    "drain": ("servers", "Let a server finish what it holds and take no more."),
    "logs": ("upkeep", "Show records as they come."),
    "stats": ("upkeep", "Counts and coverage of the store."),
    "prune": ("upkeep", "Delete old records."),
    "tag": ("upkeep", "Set tags of a record."),
}


class _Commands(click.Group):
    """A group that imports a subcommand's module only to run it."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"tuner_client.cli.{_COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if arguments and arguments[0] not in _COMMANDS and not arguments[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(arguments[0], _COMMANDS, 1)
            meant = f"; did you mean '{close[0]}'?" if close else "; see: tuner-client --help"
            raise click.UsageError(f"there is no command '{arguments[0]}'{meant}", context)
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        import importlib.metadata

        try:
            version = importlib.metadata.version("gpu-autotuner")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"tuner-client {version}")
        context.exit()


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: tuner-client tune model.onnx --sm-percent 50 --output model.so",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
def cli() -> None:
    """Tune the operators of a model on the device they will run on, at the share of it they will get.

    Commands talk to the server given by --server or TUNER_SERVER; with none, they start a local one on your data
    directory for as long as they need it.
    """


def _on_signal(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with the code of :class:`tuner_core.errors.ExitCode`, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    leave_torch_out()
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: a job is saved, a local server stopped
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _on_signal)
    try:
        code = cli.main(given, prog_name="tuner-client", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = ExitCode.USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None and "--help" not in str(error) else ""
        message = error.format_message().rstrip(".").replace("\n", " ")
        code = fail(UsageError(f"{message[:1].lower()}{message[1:]}{hint}"), given)
    except (KeyboardInterrupt, click.Abort):
        code = interrupted(given)
    except TunerError as error:
        code = fail(error, given)
    except BrokenPipeError:  # the reader went away: `tuner-client query | head`
        sys.stderr.close()
        code = ExitCode.FAILED
    except OSError as error:
        code = ExitCode.FAILED if error.errno == errno.EPIPE else fail(error, given)
    except Exception as error:
        code = fail(error, given)
    sys.exit(int(code or 0))
