"""Models built from a server's records."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.client.server import ServerClient
from tuner_client.preparing import import_model, prepare_model
from tuner_client.request import check_layout, check_model_path, check_output, check_sm_percent

if TYPE_CHECKING:
    from tuner_client.building import BuildReport
    from tuner_client.job import JobReport
    from tuner_client.model.load import ImportedModel
    from tuner_client.model.prepare import Prepared


class ModelClient(ServerClient):
    """Imports, prepares and builds models for the server's device."""

    def _import(self, path: Path, input_shapes: Mapping[str, tuple[int, ...]]) -> ImportedModel:
        return import_model(path, input_shapes, self._progress, self._quiet)

    def _prepare(self, imported: ImportedModel, target_json: str, layout: str) -> Prepared:
        return prepare_model(imported, target_json, self._progress, self._quiet, layout)

    def _build_for_job(self, report: JobReport, prepared: Prepared, output: Path) -> JobReport:
        from tuner_client.building import build_model, choose_for_job
        from tuner_client.selection import Place

        target_json = json.dumps(dict(report.target))
        with self._progress.step(f"building {output.name}"):
            place = Place(report.device_model, report.sm_count, target_json)
            with self._quiet():
                chosen = choose_for_job(prepared, self.store, report, place)
                built = build_model(prepared, chosen, output, place)
        return dataclasses.replace(report, output=str(output), coverage=built.coverage())

    def build(
        self,
        model: str | os.PathLike[str],
        *,
        sm_percent: int,
        output: str | os.PathLike[str],
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        target: Mapping[str, Any] | None = None,
        device: str | None = None,
        layout: str = "auto",
        strict: bool = True,
    ) -> BuildReport:
        """Build a model from records, without measuring anything.

        Args:
            model: ``.onnx`` or ``.pt2`` file.
            sm_percent: Share to build for, 1..100.
            output: File to write.
            input_shapes: Shapes of inputs by name, where the model leaves them open.
            target: Target; None: the server's own at this share.
            device: Model, UUID or name (``cuda:1``) of the server's device to build for, where it has several models
                and no target says which.
            layout: Of 2-D convolutions, as given to ``tune``.
            strict: Only records of exactly this device, SM count, target and TVM version. When False, an operator
                without any takes the nearest, see :class:`tuner_client.RecordDatabase`; the report names these.

        Returns:
            What was built, with the coverage: N of M operators tuned.

        Raises:
            UsageError: The server has devices of several models, and nothing says which is meant.
            ConflictError: It has no such device.
        """
        from tuner_client.building import build_model, choose, open_database
        from tuner_client.places import choose_place
        from tuner_client.selection import Place

        check_sm_percent(sm_percent)
        check_layout(layout)
        check_model_path(Path(model))
        check_output(Path(output))
        imported = self._import(Path(model), {key: tuple(shape) for key, shape in (input_shapes or {}).items()})
        host = self.host(sm_percent)
        asked = None if target is None else json.dumps(dict(target))
        chosen_place = choose_place(host, self.connection.address, device=device, target_json=asked)
        target_json = asked or chosen_place.target_json
        prepared = self._prepare(imported, target_json, layout)
        place = Place(chosen_place.device_model, chosen_place.sm_count, target_json)
        with self._progress.step(f"building {Path(output).name}"), self._quiet():
            chosen = choose(prepared, open_database(self.store, place, strict=strict))
            return build_model(prepared, chosen, Path(output), place)
