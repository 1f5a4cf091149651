"""What is declared in several places agrees."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import tuner_server
from tuner_core.compiler import tvm_setup
from tuner_core.model import TVM_VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_tvm_pins_are_the_same_everywhere() -> None:
    pins = {f"apache-tvm=={tvm_setup.TVM_PIN}", f"apache-tvm-ffi=={tvm_setup.FFI_PIN}"}
    constraints = (ROOT / "constraints.txt").read_text().split()
    assert pins <= set(PROJECT["dependencies"])
    assert pins <= set(constraints)
    assert TVM_VERSION == tvm_setup.TVM_PIN


def test_version_of_the_package_is_the_one_that_commands_print() -> None:
    assert tuner_server.__version__ == PROJECT["version"]


def test_client_and_core_import_nothing_of_the_server() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}: {name}"
        for package in ("tuner_core", "tuner_client")
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in _imports(path)
        if name.split(".")[0] == "tuner_server" or (package == "tuner_core" and name.split(".")[0] == "tuner_client")
    ]
    assert offenders == []


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return names
