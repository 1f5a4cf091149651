"""Settings of a server: flag over environment (``TUNER_...``) over file over default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
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
class DeviceSettings:
    """One device and how it is divided, unless a job needs it divided otherwise.

    Attributes:
        device: ``auto`` (the GPUs of one model, else the CPU), ``cpu``, ``cpu:CORES``, ``cuda`` (every GPU),
            ``cuda:INDEX`` or ``cuda:UUID``.
        sm_percent: Share of each worker; 0: the whole device.
        workers: Number of workers; 0: as many as fit.
        partitions: Shares of the workers one by one, instead of the two above.
        oversubscribe: Allow shares that sum to more than 100.
        mps: ``auto``, ``external`` or ``off``.
        pause_builds: Whether search and build stop while a GPU measures for publication: ``auto`` (for short kernels
            and whole models), ``always`` or ``never``.
    """

    device: str = "auto"
    sm_percent: int = 0
    workers: int = 0
    partitions: tuple[int, ...] = ()
    oversubscribe: bool = False
    mps: str = "auto"
    pause_builds: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: Shares one by one and at once, or a share out of range.
        """
        if self.partitions and (self.sm_percent or self.workers):
            raise UsageError(f"partitions of {self.device} stand for sm_percent and workers: give one or the other")
        for share in (*self.partitions, self.sm_percent or 100):
            if not 1 <= share <= 100:
                raise UsageError(f"every share must be 1 to 100, not {share}")


@dataclass(frozen=True)
class ServerConfig:
    """Everything that a server is told.

    Attributes:
        listen: HOST:PORT; port 0: any free one.
        store: Store URL; empty: SQLite in the data directory.
        devices: What is measured on.
        repartition: Whether a job that asks for another share gets the device re-partitioned when it is free.
        batch: Candidates per search batch; 0: chosen for the device.
        lend_cores: Whether builds may run on the cores of a GPU's workers while these leave them idle.
        lazy: Start worker processes at the first need, not at once.
        trace: File for a trace of what all processes do; None: none.
        exit_with_parent: Process id to follow into its end; 0: none. Such an embedded server leaves interrupted jobs
            stopped, others resume theirs when they start.
    """

    listen: str = DEFAULT_LISTEN
    data_dir: Path = Path()
    store: str = ""
    devices: tuple[DeviceSettings, ...] = (DeviceSettings(),)
    repartition: bool = True
    evaluator: EvaluatorSettings = field(default_factory=EvaluatorSettings)
    build_timeout_s: float = 30.0
    run_timeout_s: float = 10.0
    reference_timeout_s: float = 60.0
    search_processes: int = 0
    build_processes: int = 0
    batch: int = 0
    lend_cores: bool = True
    tls: TlsFiles | None = None
    token_file: Path | None = None
    insecure: bool = False
    reflection: bool = False
    allow_volatile_store: bool = False
    lazy: bool = False
    trace: Path | None = None
    exit_with_parent: int = 0

    @property
    def store_url(self) -> str:
        """The store's URL, the embedded one by default."""
        return self.store or f"sqlite:///{self.data_dir / 'records.sqlite'}"


_DEVICE_KEYS = frozenset(entry.name for entry in fields(DeviceSettings))


def device_settings(entries: Any, defaults: DeviceSettings) -> tuple[DeviceSettings, ...]:
    """The list ``devices:`` of a configuration file.

    Args:
        entries: As read: mappings with a ``device`` and what is particular to it, or just names of devices.
        defaults: What holds where an entry does not say otherwise.

    Raises:
        UsageError: It is no such list.
    """
    if not isinstance(entries, list) or not entries:
        raise UsageError("devices must be a list, e.g. [{device: cuda:0, partitions: [50, 25, 25]}, {device: cuda:1}]")
    settings = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"device": entry}
        if not isinstance(entry, Mapping) or not isinstance(entry.get("device"), str):
            raise UsageError(f"every entry of devices needs a device, e.g. device: cuda:0; not {entry!r}")
        own = {str(key).replace("-", "_"): value for key, value in entry.items()}
        unknown = sorted(set(own) - _DEVICE_KEYS)
        if unknown:
            raise UsageError(
                f"{own['device']} has an unknown setting: {unknown[0]}; known: {', '.join(sorted(_DEVICE_KEYS))}"
            )
        if own.keys() & {"partitions", "sm_percent", "workers"}:  # its own division, nothing of the general one
            own = {"partitions": (), "sm_percent": 0, "workers": 0, **own}
        settings.append(replace(defaults, **_typed(own)))
    return tuple(settings)


def _typed(entry: dict[str, Any]) -> dict[str, Any]:
    """Values of the types that the settings have.

    Raises:
        UsageError: One is of another type.
    """

    def refuse(key: str, wanted: str) -> UsageError:
        return UsageError(f"{key} of {entry['device']} wants {wanted}, not {entry[key]!r}")

    typed = dict(entry)
    for key in ("sm_percent", "workers"):
        if not isinstance(entry.get(key, 0), int) or isinstance(entry.get(key, 0), bool):
            raise refuse(key, "a whole number")
    if "partitions" in entry:
        try:
            typed["partitions"] = parse_shares(entry["partitions"])
        except ValueError:
            raise refuse("partitions", "shares in percent, e.g. [50, 25, 25]") from None
    if entry.get("mps", "auto") is False:  # YAML reads off as false
        typed["mps"] = "off"
    elif entry.get("mps", "auto") not in ("auto", "external", "off"):
        raise refuse("mps", "auto, external or off")
    if entry.get("pause_builds", "auto") not in ("auto", "always", "never"):
        raise refuse("pause_builds", "auto, always or never")
    if not isinstance(entry.get("oversubscribe", False), bool):
        raise refuse("oversubscribe", "true or false")
    return typed


def parse_shares(value: Any) -> tuple[int, ...]:
    """Shares as a list, or as text with commas.

    Raises:
        ValueError: They are not whole numbers.
    """
    words = value if isinstance(value, list | tuple) else str(value).split(",")
    if any(isinstance(word, float | bool) for word in words):
        raise ValueError
    return tuple(int(word) for word in words)


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
