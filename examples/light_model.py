"""Print the path of a small real model that the package onnx brings along.

    python examples/light_model.py squeezenet

Its weights are all 0.02, which does not matter for speed: an operator's latency depends on shapes, not on values.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def light_models() -> dict[str, Path]:
    """The models by name."""
    spec = find_spec("onnx")
    if spec is None or spec.origin is None:
        sys.exit("error: onnx is not installed: pip install onnx")
    folder = Path(spec.origin).parent / "backend" / "test" / "data" / "light"
    return {path.stem.removeprefix("light_"): path for path in sorted(folder.glob("light_*.onnx"))}


def main() -> None:
    """Print one path, or the names there are."""
    models = light_models()
    if len(sys.argv) != 2 or sys.argv[1] not in models:
        sys.exit(f"usage: light_model.py NAME, one of: {', '.join(models)}")
    print(models[sys.argv[1]])


if __name__ == "__main__":
    main()
