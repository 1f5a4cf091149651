"""``torch.export`` programs. torch is an optional extra: without it, these are skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.compiler_operators import LLVM
from tuner_client.model.load import load_model
from tuner_client.model.prepare import parse_target, prepare
from tuner_core.compiler.apply import apply_schedules
from tuner_core.compiler.executable import build_executable
from tuner_core.errors import ModelError, UsageError

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gpu-autotuner[torch]'")


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, groups=16, padding=1, stride=2),
        torch.nn.ReLU6(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    ).eval()


def save(module: Any, path: Path, *inputs: Any, **options: Any) -> Path:
    torch.export.save(torch.export.export(module, inputs, **options), str(path))
    return path


def test_imports_runs_and_agrees_with_torch(network: Any, tmp_path: Path) -> None:
    import tvm
    from tvm import relax

    x = torch.randn(1, 3, 32, 32)
    imported = load_model(save(network, tmp_path / "net.pt2", x))
    assert (imported.kind, imported.name) == ("torch", "net")
    assert [entry[1:] for entry in imported.inputs] == [((1, 3, 32, 32), "float32")]
    prepared = prepare(imported.module, LLVM)
    kinds = [task.workload.op for task in prepared.tasks]
    assert "conv2d" in kinds and "depthwise_conv2d" in kinds and "dense" in kinds
    target = parse_target(LLVM)
    executable = build_executable(apply_schedules(prepared.module, target, {})[0], target)
    given = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy()))
    np.testing.assert_allclose(given.numpy(), network(x).detach().numpy(), rtol=1e-3, atol=1e-5)


def test_open_batch_is_asked_for_and_bound(network: Any, tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    path = save(network, tmp_path / "net.pt2", torch.randn(2, 3, 32, 32), dynamic_shapes=({0: batch},))
    with pytest.raises(ModelError, match=r"--input-shape input=N,3,32,32"):
        load_model(path)
    with pytest.raises(UsageError, match="no input 'x'; its inputs: input"):
        load_model(path, {"x": (4, 3, 32, 32)})
    imported = load_model(path, {"input": (4, 3, 32, 32)})
    assert imported.inputs == (("input", (4, 3, 32, 32), "float32"),)
    descriptions = [task.workload.description for task in prepare(imported.module, LLVM).tasks]
    assert any(text.startswith("conv2d 4x3x32x32 -> 16, 3x3") for text in descriptions)


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    class Bessel(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.special.i0(x)

    with pytest.raises(ModelError, match="torch frontend lacks: i0"):
        load_model(save(Bessel(), tmp_path / "m.pt2", torch.randn(4)))


def test_truncated_program(network: Any, tmp_path: Path) -> None:
    path = save(network, tmp_path / "net.pt2", torch.randn(1, 3, 32, 32))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"not a torch.export program"):
        load_model(path)
