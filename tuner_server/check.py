"""``tuner-server check``: what a host offers, tried for real."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from importlib import resources

from tuner_core.errors import TunerError
from tuner_core.model import EvaluatorSettings, Workload
from tuner_core.store.open import open_store
from tuner_server.config import ServerConfig
from tuner_server.engine import Engine
from tuner_server.lanes.device import SharedDevice
from tuner_server.measure.requests import MeasureRequest
from tuner_server.trial import TrialFailed


@dataclass(frozen=True)
class Finding:
    """One line of the check."""

    what: str
    ok: bool
    text: str


def selftest_workload() -> Workload:
    """A small matmul (fp32, 128x128x128) for one test measurement."""
    stored = json.loads(resources.files("tuner_server").joinpath("selftest_workload.json").read_text())
    stored["args_info"] = tuple((kind, dtype, tuple(shape)) for kind, dtype, shape in stored["args_info"])
    return Workload(**stored)


async def run_checks(config: ServerConfig) -> list[Finding]:
    """Try everything that a server needs, without listening.

    Args:
        config: Settings of the server that would run.

    Returns:
        Findings in order; what depends on a failed one is left out.
    """
    findings: list[Finding] = [await _store(config)]
    engine = Engine(config)
    try:
        try:
            await engine.start()
        except TunerError as error:
            findings.append(Finding("workers", False, str(error)))
            return findings
        findings.append(Finding("tvm", True, f"apache-tvm {engine.tvm_version} loads"))
        findings.extend(Finding("devices", True, note) for note in engine.notes)
        for device in engine.devices:
            findings += await _device(engine, device)
    finally:
        await engine.stop()
    return findings


async def _device(engine: Engine, device: SharedDevice) -> list[Finding]:
    """What a device is, how it is divided, what its workers see, and one measurement."""
    info = device.info
    unit = "cores" if info.kind == "cpu" else "SMs"
    versions = "".join(
        f", {name} {version}"
        for name, version in (("driver", info.driver_version), ("CUDA", info.cuda_version))
        if version
    )
    kinds = ", ".join(str(kind) for kind in device.provider.kinds_on_offer)
    shares = " + ".join(f"{share}" for share in device.configured)
    target = await device.provider.target_json(device.configured[0])
    findings = [
        Finding(
            "device", True, f"{device.name}: {info.model} ({info.arch}), {info.sm_count} {unit}{versions}, {info.uuid}"
        ),
        Finding("partitions", True, f"{kinds}: {shares} %"),
        *(Finding("partitions", True, line) for line in device.provider.describe()),
        Finding("target", True, target),
    ]
    for worker in device.fleet.workers():
        text = f"{worker.kind} {worker.sm_percent} %: sees {worker.sm_count_seen} {unit}"
        if worker.affinity:
            text += f", on cores {','.join(map(str, worker.affinity))}"
        findings.append(Finding(f"worker {worker.index}", worker.state != "lost", text))
    findings.append(await _measurement(engine, device, target))
    return findings


async def _store(config: ServerConfig) -> Finding:
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True)
        store = await asyncio.to_thread(open_store, config.store_url, allow_volatile=config.allow_volatile_store)
        count = (await asyncio.to_thread(store.stats))["records"]
        await asyncio.to_thread(store.close)
    except TunerError as error:
        return Finding("store", False, str(error))
    except OSError as error:
        return Finding("store", False, f"cannot write the data directory {config.data_dir} ({error.strerror})")
    return Finding("store", True, f"{config.store_url.split('@')[-1]}, {count} records")


async def _measurement(engine: Engine, device: SharedDevice, target_json: str) -> Finding:
    workload = selftest_workload()
    try:
        built = await engine.build.fallback(workload, target_json)
        measured = await device.fleet.measure(
            MeasureRequest(
                built.artifact.path,
                workload.args_info,
                EvaluatorSettings(),
                engine.run_timeout_s,
                sm_percent=device.configured[0],
            )
        )
    except TrialFailed as failure:
        return Finding("measurement", False, f"{device.name}, {workload.description}: {failure.kind}: {failure}")
    spread = f"{measured.ci_low_us:.1f} to {measured.ci_high_us:.1f}"
    share = f"{device.name} at {device.configured[0]} %"
    return Finding("measurement", True, f"{share}, {workload.description}: {measured.median_us:.1f} us ({spread})")


def show(findings: list[Finding], *, as_json: bool) -> str:
    """The findings as text, or as one JSON document."""
    if as_json:
        ok = all(finding.ok for finding in findings)
        return json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]})
    width = max(len(finding.what) for finding in findings)
    return "\n".join(
        f"{'ok     ' if finding.ok else 'PROBLEM'} {finding.what:<{width}}  {finding.text}" for finding in findings
    )
