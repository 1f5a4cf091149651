"""ResNet-50 (light model of the package onnx) tuned at a share of one GPU, from start to finish.

    python benchmarks/gpu_resnet50.py [--dtype float32|float16] [--trials 1000] [--layout auto|NHWC|NCHW]
    python benchmarks/gpu_resnet50.py --device cpu --trials 40        # rehearsal, with a small model

A real ``tuner-server --sm-percent 25 --workers 4`` with an empty store, and ``tuner-client tune``. Writes
``resnet50-DTYPE.json``, ``.md`` and the picture of the server's timeline: latency of every operator and of the whole
model, tuned and untuned (TVM's default schedules: dlight on a GPU), trials per second, pauses, busy shares of the
stages. One to three minutes.
"""

from __future__ import annotations

import argparse
import sys

import results
from model_job import common_options, markdown, model_file, parsed, traced_job


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, trials=1000, name="")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--layout", choices=("auto", "NHWC", "NCHW"), default="auto")
    options = parsed(parser)
    before = results.machine()
    with model_file(options, options.dtype) as model:
        name = options.name or f"{options.model or model.stem.removeprefix('light_').split('_')[0]}-{options.dtype}"
        try:
            row, device = traced_job(options, model, name, ["--layout", options.layout])
        except RuntimeError as error:
            sys.exit(f"error: {error}")
    lines = markdown(f"{name}, {options.trials} trials", row, device.model)
    written = results.write(
        name,
        [row],
        device=device.model,
        driver=device.driver_version or None,
        machine_before=before,
        directory=options.out,
        markdown=lines,
        dtype=options.dtype,
    )
    print("\n".join(lines))
    print(f"written to {written}")


if __name__ == "__main__":
    main()
