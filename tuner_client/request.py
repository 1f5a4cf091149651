"""What a user asks to have tuned, checked before anything slow begins."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner_core.allocation.budget import DEFAULT_NEGLIGIBLE_SHARE
from tuner_core.allocation.stopping import DEFAULT_PATIENCE
from tuner_core.errors import UsageError
from tuner_core.model import canonical_json

MAX_TRIALS = 1_000_000
TRIALS_PER_TASK = 64
LAYOUTS = ("auto", "NCHW", "NHWC")
EXPERIENCES = ("store", "job", "none")
"""Trials of all other tasks, the store's too where eight related ones have some; of the tasks of this job; nothing."""
_MAX_NAME = 200


@dataclass(frozen=True)
class TuneRequest:
    """One ``tune`` request.

    Attributes:
        model: ``.onnx`` or ``.pt2`` file.
        sm_percent: Share of the device, 1..100; None: the server's first share.
        input_shapes: Shapes of inputs by name, where the model leaves them open.
        trials: The whole job's budget; None: 64 for each tunable task.
        target_json: Target as JSON; None: the server's own.
        output: File to build, or None.
        name: Name of the model in records; None: the file's.
        team: Team that the records belong to.
        refresh: Ignore what the store holds.
        seed: Of the search.
        tags: Stored with every record.
        layout: Of 2-D convolutions: ``auto``, ``NCHW`` or ``NHWC``.
        early_stopping: A task whose last so many trials hardly shortened the model gets no more; 0: never.
        negligible_percent: Operators that together take less of the untuned model get no trials; 0: none.
        experience: What a search starts from besides its own task's trials, see :data:`EXPERIENCES`.

    Raises:
        UsageError: A value is out of range or malformed.
    """

    model: Path
    sm_percent: int | None = None
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trials: int | None = None
    target_json: str | None = None
    output: Path | None = None
    name: str | None = None
    team: str = ""
    refresh: bool = False
    seed: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    layout: str = "auto"
    early_stopping: int = DEFAULT_PATIENCE
    negligible_percent: float = 100 * DEFAULT_NEGLIGIBLE_SHARE
    experience: str = EXPERIENCES[0]

    def __post_init__(self) -> None:
        check_sm_percent(self.sm_percent)
        check_model_path(self.model)
        check_layout(self.layout)
        if self.trials is not None and not 1 <= self.trials <= MAX_TRIALS:
            raise UsageError(f"--trials must be between 1 and {MAX_TRIALS}, not {self.trials}")
        if not 0 <= self.early_stopping <= MAX_TRIALS:
            raise UsageError(f"--early-stopping must be between 0 (never) and {MAX_TRIALS}, not {self.early_stopping}")
        if not 0 <= self.negligible_percent < 100:
            raise UsageError(f"--negligible must be at least 0 and under 100, not {self.negligible_percent:g}")
        if self.experience not in EXPERIENCES:
            raise UsageError(f"--experience must be one of {', '.join(EXPERIENCES)}, not '{self.experience[:40]}'")
        if self.output is not None:
            check_output(self.output)
        if self.name is not None and not self.name.strip():
            raise UsageError("--name must not be empty")
        for flag, value in (("--name", self.name or ""), ("--team", self.team)):
            if len(value) > _MAX_NAME or not all(character.isprintable() for character in value):
                raise UsageError(f"{flag} must be one printable line of at most {_MAX_NAME} characters")

    @property
    def model_name(self) -> str:
        """Name of the model in records."""
        return self.name or self.model.stem


def check_sm_percent(value: int | None, flag: str = "--sm-percent") -> None:
    """Refuse a share outside 1..100.

    Raises:
        UsageError: It is.
    """
    if value is not None and not 1 <= value <= 100:
        raise UsageError(f"{flag} must be between 1 and 100, not {value}")


def check_layout(value: str) -> None:
    """Refuse what is no layout.

    Raises:
        UsageError: It is not one of ``LAYOUTS``.
    """
    if value not in LAYOUTS:
        raise UsageError(f"--layout must be one of {', '.join(LAYOUTS)}, not '{value[:40]}'")


def check_model_path(path: Path) -> None:
    """Refuse a model that is not there, before TVM is imported to say so.

    Raises:
        UsageError: There is no such file.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory, not a model file")
    if not path.exists():
        raise UsageError(f"there is no model file {path}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"the model file {path} cannot be read (permission denied)")


def check_output(path: Path) -> None:
    """Refuse an output that could not be written hours later.

    Raises:
        UsageError: It is a directory, or its directory is missing or not writable.
    """
    if path.is_dir():
        raise UsageError(f"--output {path} is a directory; give a file, e.g. {path / 'model.so'}")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"--output {path} cannot be written (permission denied)")


def parse_input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name from ``NAME=1,3,224,224`` texts.

    Raises:
        UsageError: One does not have this form, or a name comes twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dimensions = text.rpartition("=")
        try:
            shape = tuple(int(part) for part in dimensions.replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not equals or not name or not shape or min(shape) < 1:
            raise UsageError(f"--input-shape '{text}' must be NAME=SHAPE with positive sizes, e.g. data=1,3,224,224")
        if name in shapes:
            raise UsageError(f"--input-shape gives '{name}' twice")
        shapes[name] = shape
    return shapes


def parse_target(text: str) -> str | None:
    """Canonical JSON of a target, None for ``auto``.

    Raises:
        UsageError: It is neither ``auto`` nor a JSON object with a ``kind``.
    """
    if text == "auto":
        return None
    try:
        target = json.loads(text)
    except ValueError:
        target = None
    if not isinstance(target, dict) or not isinstance(target.get("kind"), str):
        raise UsageError(
            f"--target must be auto or a JSON object with a kind, e.g. '{{\"kind\": \"llvm\"}}', not '{text[:60]}'"
        )
    return canonical_json(target)


def parse_tags(texts: Sequence[str], flag: str = "--tag ") -> dict[str, str]:
    """Tags from ``KEY=VALUE`` texts.

    Raises:
        UsageError: One does not have this form.
    """
    tags: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag}'{text}' must be KEY=VALUE")
        tags[key] = value
    return tags
