"""The message that submits a job: the lifted module and the tasks, never a weight."""

from __future__ import annotations

import uuid
import zlib
from typing import TYPE_CHECKING

from tuner_client.request import TRIALS_PER_TASK, TuneRequest
from tuner_core.proto.tuner.v1 import tuning_pb2
from tuner_core.store.wire import workload_to_message

if TYPE_CHECKING:
    from tuner_client.model.prepare import Prepared


def job_spec(request: TuneRequest, prepared: Prepared, *, digest: str, target_json: str) -> tuning_pb2.JobSpec:
    """What the server needs to tune a prepared model.

    Args:
        request: What the user asked for.
        prepared: The model, prepared for ``target_json``.
        digest: sha256 of the model's file.
        target_json: Target that the model was prepared for.
    """
    tunable = sum(task.tunable for task in prepared.tasks)
    return tuning_pb2.JobSpec(
        model=request.model_name,
        model_digest=digest,
        lifted_module_zlib=zlib.compress(prepared.lifted_json.encode(), 6),
        tasks=[
            tuning_pb2.TaskSpec(
                name=task.name, workload=workload_to_message(task.workload), weight=task.weight, tunable=task.tunable
            )
            for task in prepared.tasks
        ],
        target_json=target_json,
        sm_percent=request.sm_percent or 100,
        trials=request.trials or max(1, TRIALS_PER_TASK * tunable),
        team=request.team,
        refresh=request.refresh,
        seed=request.seed,
        request_id=uuid.uuid4().hex,
        tags=dict(request.tags),
        layout=prepared.layout,
        early_stopping=request.early_stopping,
        negligible_percent=request.negligible_percent,
        experience=request.experience,
    )
