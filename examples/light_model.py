"""Print the path of a small real model that the package onnx brings along, or write its half-precision variant.

    python examples/light_model.py squeezenet
    python examples/light_model.py resnet50 --dtype float16 --output resnet50_fp16.onnx

Its weights are all 0.02, which does not matter for speed: an operator's latency depends on shapes, not on values. A
variant that is written gets seeded random weights, so that its outputs depend on its inputs.
"""

from __future__ import annotations

import argparse
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


def write_variant(model: Path, dtype: str, output: Path) -> None:
    """Write a model with random weights.

    Args:
        model: A light model.
        dtype: ``float32`` or ``float16``, of weights, inputs and outputs.
        output: Where to.
    """
    import onnx
    from random_weights import randomise, to_float16

    variant = onnx.load(str(model))
    randomise(variant, seed=0)
    if dtype == "float16":
        to_float16(variant)
    onnx.save(variant, str(output))


def main() -> None:
    """Print one path."""
    models = light_models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=models, metavar="NAME", help=f"one of: {', '.join(models)}")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default for float16: NAME_float16.onnx here")
    arguments = parser.parse_args()
    path = models[arguments.name]
    if arguments.dtype != "float32" or arguments.output:
        output = arguments.output or Path(f"{arguments.name}_{arguments.dtype}.onnx")
        write_variant(path, arguments.dtype, output)
        path = output
    print(path)


if __name__ == "__main__":
    main()
