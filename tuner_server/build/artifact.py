"""What a build leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artifact:
    """A built shared library, or the file of a single kernel.

    Attributes:
        path: Where it is; the owner of the pool that built it releases it.
        seconds: Wall time of the build in its process.
    """

    path: Path
    seconds: float


@dataclass(frozen=True)
class FallbackBuild:
    """The fallback schedule of a workload, built.

    Attributes:
        trace: JSON of its trace.
        artifact: What was built.
    """

    trace: str
    artifact: Artifact


@dataclass(frozen=True)
class ModelBuild:
    """A whole model, built.

    Attributes:
        artifact: Its executable.
        args_info: One ``("TENSOR", dtype, shape)`` per parameter of ``main``: inputs, then lifted weights.
        coverage: Of the traces, see ``tuner_core.compiler.apply.Coverage``.
    """

    artifact: Artifact
    args_info: tuple[tuple[str, str, tuple[int, ...]], ...]
    coverage: Mapping[str, Any]
