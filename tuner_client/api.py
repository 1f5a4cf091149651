"""The Python API: what the commands do, as functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tuner_client.client.jobs import JobClient
from tuner_client.client.records import RecordClient
from tuner_client.job import JobInterrupted as JobInterrupted
from tuner_client.job import JobReport
from tuner_client.progress import Progress
from tuner_core.allocation.budget import DEFAULT_NEGLIGIBLE_SHARE
from tuner_core.allocation.stopping import DEFAULT_PATIENCE
from tuner_core.transport.options import ConnectionOptions


class Client(JobClient, RecordClient):
    """A client of one server. It connects at the first call that needs the server.

    Args:
        server: ``HOST:PORT``, or how to connect to it; None: the server that runs on the data directory, else one of
            our own for as long as this client is open.
        early_stopping: A task whose last so many trials hardly shortened the model gets no more; 0: never.
        negligible_percent: Operators that together take less of the untuned model get no trials; 0: tune all.
        experience: Whose trials a search learns from besides its own operator's: ``store`` (also past
            ones, where at least eight related operators have some), ``job`` (this job's) or ``none``.
        data_dir: The data directory; None: the user's.
        progress: Hears what happens; None: nobody.
        reconnect_s: For how long a job that is followed waits for a lost server.
        quiet: Gives a context to open around work in libraries that print (import, preparation, build).
        server_arguments: Command-line arguments for a server of our own.

    Raises (any method):
        TunerError: With one line saying what is wrong and what to do.
    """


def tune(
    model: str | os.PathLike[str],
    *,
    server: str | ConnectionOptions | None = None,
    sm_percent: int | None = None,
    trials: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    target: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    team: str = "",
    refresh: bool = False,
    seed: int = 0,
    tags: Mapping[str, str] | None = None,
    layout: str = "auto",
    early_stopping: int = DEFAULT_PATIENCE,
    negligible_percent: float = 100 * DEFAULT_NEGLIGIBLE_SHARE,
    experience: str = "store",
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> JobReport:
    """Tune a model and wait for it.

    Args:
        model: ``.onnx`` or torch.export ``.pt2`` file.
        server: ``HOST:PORT`` or how to connect; None: ``TUNER_SERVER``, else a local server for as long as this takes.
        sm_percent: Share of the device's SMs (of the cores, on a CPU), 1..100; None: the server's first share.
        trials: Budget of the whole job; None: 64 for each operator worth tuning.
        input_shapes: Shapes of inputs by name, where the model leaves them open.
        target: TVM target; None: the server's own.
        output: File to build, which stock TVM loads.
        name: Name of the model in records; None: the file's.
        team: Team that the records belong to.
        refresh: Measure again what the store already holds.
        seed: Of the search.
        tags: Stored with every record.
        layout: Of 2-D convolutions: ``NCHW`` (as the model has them), ``NHWC``, or ``auto``: NHWC for fp16 on GPUs with
            tensor cores.
        data_dir: The data directory; None: the user's.
        progress: Hears what happens.

    Returns:
        How the job ended.

    Raises:
        UsageError: An argument is wrong.
        ModelError: The model cannot be read or imported.
        UnavailableError: The server cannot be reached, or went away and stayed away.
        JobInterrupted: Ctrl-C.
    """
    chosen = server if server is not None else os.environ.get("TUNER_SERVER") or None
    arguments = ["--sm-percent", str(sm_percent)] if sm_percent is not None else []
    with Client(chosen, data_dir=data_dir, progress=progress, server_arguments=arguments) as client:
        return client.tune(
            model,
            sm_percent=sm_percent,
            trials=trials,
            input_shapes=input_shapes,
            target=target,
            output=output,
            name=name,
            team=team,
            refresh=refresh,
            seed=seed,
            tags=tags,
            layout=layout,
            early_stopping=early_stopping,
            negligible_percent=negligible_percent,
            experience=experience,
        )
