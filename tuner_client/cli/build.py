"""``tuner-client build``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tuner_client.cli.ending import print_document
from tuner_client.cli.session import Session, session_options
from tuner_client.request import (
    LAYOUTS,
    check_model_path,
    check_output,
    check_sm_percent,
    parse_input_shapes,
    parse_target,
)


@click.command("build", epilog="Example: tuner-client build resnet50.onnx --sm-percent 25 -o resnet50.so")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--sm-percent", type=int, required=True, metavar="P", help="Share to build for, 1..100.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, metavar="FILE", help="File to write.")
@click.option("--input-shape", multiple=True, metavar="NAME=SHAPE", help="Of an open input; repeatable.")
@click.option("--target", default="auto", metavar="auto|JSON", help="TVM target.  [default: auto, the server's own]")
@click.option("--device", metavar="NAME", help="Model, UUID or name (cuda:1), where the server has several models.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    help="Of 2-D convolutions.  [default: auto: NHWC for fp16 where there are tensor cores, else as the model has it]",
)
@click.option(
    "--nearest-share", is_flag=True, help="For operators without a record of this share, the nearest one, and say so."
)
@session_options
def build_command(
    session: Session,
    model: Path,
    sm_percent: int,
    output: Path,
    input_shape: tuple[str, ...],
    target: str,
    device: str | None,
    layout: str,
    nearest_share: bool,
) -> None:
    """Build MODEL from records for a share of the server's device, without measuring anything.

    Says how many operators run a tuned schedule; the others run the fallback schedule.
    """
    check_sm_percent(sm_percent)
    check_model_path(model)
    check_output(output)
    shapes = parse_input_shapes(input_shape)
    target_json = parse_target(target)
    with session.client(["--sm-percent", str(sm_percent)], lines=True) as client:
        report = client.build(
            model,
            sm_percent=sm_percent,
            output=output,
            input_shapes=shapes,
            target=json.loads(target_json) if target_json else None,
            device=device,
            layout=layout,
            strict=not nearest_share,
        )
    session.close_view()
    if session.as_json:
        print_document(report.document())
        return
    session.show(f"built {report.output}: {report.line()}, for {report.device_model} at {sm_percent} %")
    for name in report.missing:
        session.show(f"  no record: {name}")
    for name, reason in report.invalid.items():
        session.show(f"  its record does not apply: {name}: {reason}")
    for trial_id, reason in report.passed_over.items():
        session.show(f"  record {trial_id[:12]} does not apply, passed over: {reason}")
    for line in report.looser.values():
        session.show(f"  looser: {line}")
    if report.missing:
        asked = f" --layout {layout}" if layout != "auto" else ""
        session.show(f"tune them with: tuner-client tune {model} --sm-percent {sm_percent}{asked}")
