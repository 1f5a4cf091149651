"""``tuner-client tune``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tuner_client.cli.session import Session, session_options
from tuner_client.cli.sharded import sharding_options, tune_on_several, wants_sharding
from tuner_client.request import EXPERIENCES, LAYOUTS, TuneRequest, parse_input_shapes, parse_tags, parse_target
from tuner_core.allocation.budget import DEFAULT_NEGLIGIBLE_SHARE
from tuner_core.allocation.stopping import DEFAULT_PATIENCE
from tuner_core.errors import UsageError


@click.command(
    "tune",
    epilog="Example: tuner-client tune resnet50.onnx --sm-percent 25 --trials 2000 --output resnet50.so",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--sm-percent", type=int, metavar="P", help="Share of the device, 1..100.  [default: the server's]")
@click.option(
    "--input-shape", multiple=True, metavar="NAME=SHAPE", help="Of an open input, e.g. data=1,3,224,224; repeatable."
)
@click.option("--trials", type=int, metavar="N", help="Budget of the whole job.  [default: 64 per tunable operator]")
@click.option("--target", default="auto", metavar="auto|JSON", help="TVM target.  [default: auto, the server's own]")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    help="Of 2-D convolutions.  [default: auto: NHWC for fp16 where there are tensor cores, else as the model has it]",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Build the tuned model there.")
@click.option("--name", metavar="NAME", help="Name of the model in records.  [default: the file's]")
@click.option("--team", default="", envvar="TUNER_TEAM", metavar="TEAM", help="Team that the records belong to.")
@click.option("--tag", multiple=True, metavar="KEY=VALUE", help="Stored with every record; repeatable.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the search.")
@click.option(
    "--early-stopping",
    type=int,
    default=DEFAULT_PATIENCE,
    show_default=True,
    metavar="TRIALS",
    help="Trials of an operator that may go by while the model hardly becomes faster; then the rest go to others. 0: "
    "never stop.",
)
@click.option(
    "--negligible",
    type=float,
    default=100 * DEFAULT_NEGLIGIBLE_SHARE,
    show_default=True,
    metavar="PERCENT",
    help="Operators that together take less of the untuned model get no trials. 0: tune all.",
)
@click.option(
    "--experience",
    type=click.Choice(EXPERIENCES),
    default=EXPERIENCES[0],
    show_default=True,
    help="Whose trials a search learns from besides its own operator's: also past ones (where at least eight related "
    "operators have some), this job's, or nobody's.",
)
@click.option("--refresh", is_flag=True, help="Measure again what the store already holds.")
@click.option("--detach", is_flag=True, help="Leave the job to the server and return at once.")
@sharding_options
@session_options
def tune_command(
    session: Session,
    model: Path,
    sm_percent: int | None,
    input_shape: tuple[str, ...],
    trials: int | None,
    target: str,
    layout: str,
    output: Path | None,
    name: str | None,
    team: str,
    tag: tuple[str, ...],
    seed: int,
    early_stopping: int,
    negligible: float,
    experience: str,
    refresh: bool,
    detach: bool,
    store: str | None,
    wait: float | None,
    heartbeat_s: float,
) -> None:
    """Tune the operators of MODEL (.onnx or torch.export .pt2), and build it.

    Ends with a table: latency of each operator and of the whole model, before and after. Ctrl-C leaves the job to a
    named server, and saves it with a local one or several; "tuner-client resume JOB" goes on.

    With --server given several times (or dns:///NAME:PORT) the operators are shared out among all of them.

    Exit codes: 0 done, 1 failed, 2 usage, 3 some operators failed, 130 interrupted.
    """
    request = TuneRequest(
        model=model,
        sm_percent=sm_percent,
        input_shapes=parse_input_shapes(input_shape),
        trials=trials,
        target_json=parse_target(target),
        output=output,
        name=name,
        team=team,
        refresh=refresh,
        seed=seed,
        tags=parse_tags(tag),
        layout=layout,
        early_stopping=early_stopping,
        negligible_percent=negligible,
        experience=experience,
    )
    if wants_sharding(session, store, wait):
        if detach:
            raise UsageError("--detach needs one server; a job over several is driven by this client")
        sys.exit(tune_on_several(session, request, store, wait, heartbeat_s))
    if detach and session.connection is None:
        raise UsageError("--detach needs a server that stays: give --server HOST:PORT (or set TUNER_SERVER)")
    from tuner_client.cli.results import run_job

    arguments = ["--sm-percent", str(sm_percent)] if sm_percent is not None else []
    with session.client(arguments, lines=True) as client:
        code = run_job(session, lambda: client.run(request, detach=detach))
    sys.exit(code)
