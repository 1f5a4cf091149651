"""Settings of a server: flag over environment (``TUNER_...``) over file over default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuner_core.errors import UsageError
from tuner_core.model import EvaluatorSettings

DEFAULT_LISTEN = "127.0.0.1:50061"


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. With ``client_ca`` set, clients must present a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ServerConfig:
    """Everything that a server is told.

    Attributes:
        listen: HOST:PORT; port 0: any free one.
        store: Store URL; empty: SQLite in the data directory.
        device: ``auto``, ``cpu``, ``cuda:INDEX`` or ``cuda:UUID``.
        sm_percent: Share of each worker; 0: the whole device.
        workers: Workers per device; 0: one.
        partitions: Shares of the workers one by one, instead of the two above.
        oversubscribe: Allow shares that sum to more than 100.
        mps: ``auto``, ``external`` or ``off``.
        repartition: Whether a job that asks for another share gets the device re-partitioned when it is free.
        batch: Candidates per search batch; 0: chosen for the device.
        lazy: Start worker processes at the first need, not at once.
        exit_with_parent: Process id to follow into its end; 0: none. Such an embedded server leaves interrupted jobs
            stopped, others resume theirs when they start.
    """

    listen: str = DEFAULT_LISTEN
    data_dir: Path = Path()
    store: str = ""
    device: str = "auto"
    sm_percent: int = 0
    workers: int = 0
    partitions: tuple[int, ...] = ()
    oversubscribe: bool = False
    mps: str = "auto"
    repartition: bool = True
    evaluator: EvaluatorSettings = field(default_factory=EvaluatorSettings)
    build_timeout_s: float = 30.0
    run_timeout_s: float = 10.0
    reference_timeout_s: float = 60.0
    search_processes: int = 0
    build_processes: int = 0
    batch: int = 0
    tls: TlsFiles | None = None
    token_file: Path | None = None
    insecure: bool = False
    reflection: bool = False
    allow_volatile_store: bool = False
    lazy: bool = False
    exit_with_parent: int = 0

    @property
    def store_url(self) -> str:
        """The store's URL, the embedded one by default."""
        return self.store or f"sqlite:///{self.data_dir / 'records.sqlite'}"


def read_config_file(path: Path, known: frozenset[str]) -> dict[str, Any]:
    """Read settings from YAML; keys are the long options without dashes in front, ``_`` or ``-`` within.

    Args:
        path: The file.
        known: Keys that are allowed.

    Raises:
        UsageError: It cannot be read, is not a mapping, or has an unknown key.
    """
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"the configuration {path} is not YAML: {str(error).splitlines()[0]}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise UsageError(f"the configuration {path} must be a mapping of settings")
    settings = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    unknown = sorted(set(settings) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise UsageError(f"the configuration {path} has an unknown setting: {unknown[0]}; known: {names}")
    return settings
