"""A half-precision model in NHWC beside the same in NCHW, tuned at a share of one GPU.

    python benchmarks/gpu_layouts.py [--trials 300] [--model resnet50]
    python benchmarks/gpu_layouts.py --device cpu --trials 16         # rehearsal, with a small model

Two jobs like those of ``gpu_resnet50.py``, one for each layout. Convolutions are compared one by one (by what they
compute, whatever the layout), and the whole models. Writes ``fp16-layouts.json``, ``.md`` and two timelines. Two to
three minutes.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import results
from model_job import common_options, markdown, milliseconds, model_file, parsed, ratio, traced_job

LAYOUTS = ("NHWC", "NCHW")
CONVOLUTION = re.compile(
    r"(?P<op>\w*conv2d\w*) (?P<shape>[\dx]+) -> (?P<out>.*), (?P<layout>NHWC|NCHW)(?P<epilogue>.*)"
)


def convolution(description: str) -> str | None:
    """What a convolution computes, without its layout and with its input as batch x height x width x channels.

    Args:
        description: Of an operator, e.g. ``conv2d 1x64x28x28 -> 128, 3x3, fp16, NCHW + relu``.

    Returns:
        None for other operators.
    """
    found = CONVOLUTION.fullmatch(description)
    if found is None:
        return None
    shape = found["shape"].split("x")
    if found["layout"] == "NCHW":
        shape = [shape[0], *shape[2:], shape[1]]
    return f"{found['op']} {'x'.join(shape)} -> {found['out']}{found['epilogue']}"


def pairs(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Convolutions that both models have, the most expensive first."""
    by_layout = {
        layout: {key: one for one in row["operators"] if (key := convolution(one["description"])) is not None}
        for layout, row in rows.items()
    }
    first, second = (by_layout[layout] for layout in rows)
    both = [
        {
            "convolution": key,
            "weight": first[key]["weight"],
            **{
                layout: {part: by_layout[layout][key][part] for part in ("baseline_latency_us", "best_latency_us")}
                for layout in rows
            },
        }
        for key in first
        if key in second
    ]
    return sorted(both, key=lambda one: -one["weight"] * (one[LAYOUTS[0]]["baseline_latency_us"] or 0.0))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser, trials=300, name="fp16-layouts")
    options = parsed(parser)
    before, failures = results.machine(), {}
    rows: dict[str, dict[str, Any]] = {}
    with model_file(options, "float16") as model:
        for layout in LAYOUTS:
            try:
                rows[layout], device = traced_job(options, model, f"{options.name}-{layout}", ["--layout", layout])
            except RuntimeError as error:
                failures[layout] = str(error)
                print(f"{layout}: {error}", flush=True)
    if not rows:
        sys.exit(1)
    compared = pairs(rows) if len(rows) == 2 else []
    lines = ["# Layouts of a half-precision model", "", "| layout | untuned | tuned |", "|---|---|---|"]
    for layout, row in rows.items():
        latency = row["model_latency_us"]
        lines.append(f"| {layout} | {milliseconds(latency['baseline'])} | {milliseconds(latency['tuned'])} |")
    if compared:
        lines += ["", "| convolution | calls | NHWC, us | NCHW, us | NHWC faster by |", "|---|---|---|---|---|"]
    for one in compared:
        fast = [one[layout]["best_latency_us"] for layout in LAYOUTS]
        shown = " | ".join(f"{value:.1f}" if value is not None else "-" for value in fast)
        lines.append(f"| {one['convolution']} | {one['weight']} | {shown} | {ratio(fast[1], fast[0])} |")
    lines.append("")
    for layout, row in rows.items():
        lines += markdown(layout, row, device.model, operators=8)
    written = results.write(
        options.name,
        list(rows.values()),
        device=device.model,
        driver=device.driver_version or None,
        machine_before=before,
        directory=options.out,
        markdown=lines,
        convolutions=compared,
        not_measured=failures,
    )
    print("\n".join(lines))
    print(f"written to {written}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
