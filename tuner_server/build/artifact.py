"""What a build leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Artifact:
    """A built shared library that ``tvm.runtime.load_module`` loads.

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
        artifact: Its library.
    """

    trace: str
    artifact: Artifact
