"""TVM is imported as if torch were not installed, and so is what looks for torch on its way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib.metadata, importlib.util, sys
from tuner_core.compiler.tvm_setup import without_torch

with without_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        assert error.name == "torch"
    else:
        sys.exit("torch was imported")
    assert importlib.util.find_spec("torch") is None
    assert "torch" not in sys.modules, "whoever finds it there uses it"
    import json.tool, adds_finder
    assert importlib.metadata.version("numpy")
import torch, found_by_the_added_finder
assert torch.imported
with without_torch():
    import torch, torch.part
"""

ADDS_FINDER = """
import importlib.machinery, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "found_by_the_added_finder":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
"""


def test_torch_is_not_found_while_it_is_left_out_and_found_afterwards(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("imported = True")
    (tmp_path / "torch" / "part.py").write_text("")
    (tmp_path / "adds_finder.py").write_text(ADDS_FINDER)
    path = [str(tmp_path), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{PROGRAM}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
