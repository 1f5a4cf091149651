"""Import and preparation of a model, with their steps shown and their libraries kept quiet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.progress import Progress

if TYPE_CHECKING:
    from tuner_client.model.load import ImportedModel
    from tuner_client.model.prepare import Prepared

Quiet = Callable[[], AbstractContextManager[Any]]


def import_model(
    path: Path, input_shapes: Mapping[str, tuple[int, ...]], progress: Progress, quiet: Quiet
) -> ImportedModel:
    """Read a model's file; see :func:`tuner_client.model.load.load_model`."""
    with progress.step(f"importing {path.name}"), quiet():
        from tuner_client.model.load import load_model

        return load_model(path, input_shapes)


def prepare_model(
    imported: ImportedModel, target_json: str, progress: Progress, quiet: Quiet, layout: str = "auto"
) -> Prepared:
    """Bring a model into the form that is tuned; see :func:`tuner_client.model.prepare.prepare`."""
    with progress.step("preparing the model and extracting its operators"), quiet():
        from tuner_client.model.prepare import prepare

        prepared = prepare(imported.module, target_json, layout)
    tunable = sum(task.tunable for task in prepared.tasks)
    calls = sum(task.weight for task in prepared.tasks)
    progress.note(f"{len(prepared.tasks)} operators ({calls} calls), {tunable} worth tuning{_layout(prepared)}")
    return prepared


def _layout(prepared: Prepared) -> str:
    return f"; convolutions in {prepared.layout}" if prepared.layout else ""
