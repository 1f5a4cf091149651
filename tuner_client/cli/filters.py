"""Options that choose records, shared by ``query``, ``export`` and ``logs``."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import click

from tuner_client.request import check_sm_percent, parse_tags
from tuner_core.errors import UsageError
from tuner_core.store.interface import RecordFilter
from tuner_core.store.shapes import parse_shape

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_age(text: str, flag: str) -> float:
    """Seconds since the epoch, so long ago: ``30d``, ``12h``, ``90m``.

    Raises:
        UsageError: It does not have this form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise UsageError(f"{flag} must be a number with s, m, h, d or w, e.g. 30d, not '{text}'")
    return time.time() - float(match[1]) * _UNITS_S[match[2]]


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the function gets a RecordFilter as ``where``."""

    @functools.wraps(command)
    def run(
        op: str,
        text: str,
        model: str,
        device: str,
        dtype: str,
        sm_percent: int | None,
        min_sm_percent: int | None,
        max_sm_percent: int | None,
        sm_count: int | None,
        team: str,
        job: str,
        verified: bool,
        since: str | None,
        tag: tuple[str, ...],
        shape: str,
        nearest_share: int | None,
        **rest: Any,
    ) -> Any:
        check_sm_percent(sm_percent)
        check_sm_percent(min_sm_percent, "--min-sm-percent")
        check_sm_percent(max_sm_percent, "--max-sm-percent")
        if sm_percent is not None and (min_sm_percent is not None or max_sm_percent is not None):
            raise UsageError("give --sm-percent, or --min-sm-percent and --max-sm-percent")
        check_sm_percent(nearest_share, "--nearest-share")
        if sm_percent is not None and nearest_share is not None:
            raise UsageError("give --sm-percent for exactly this share, or --nearest-share for what comes closest")
        if shape:
            parse_shape(shape)
        if min_sm_percent is not None and max_sm_percent is not None and min_sm_percent > max_sm_percent:
            raise UsageError(f"--min-sm-percent {min_sm_percent} is above --max-sm-percent {max_sm_percent}")
        where = RecordFilter(
            op=op,
            text=text,
            model=model,
            dtype=dtype,
            device_model=device,
            sm_percent=sm_percent,
            min_sm_percent=min_sm_percent,
            max_sm_percent=max_sm_percent,
            sm_count=sm_count,
            team=team,
            job=job,
            verified_only=verified,
            since=parse_age(since, "--since") if since else None,
            tags=parse_tags(tag),
            shape=shape,
            nearest_sm_percent=nearest_share,
        )
        return command(where=where, **rest)

    options = [
        click.option("--op", default="", metavar="OP", help="Operator kind, e.g. conv2d."),
        click.option("--text", default="", metavar="TEXT", help="Part of the description, e.g. 3x3."),
        click.option("--model", default="", metavar="NAME", help="Name of the model."),
        click.option("--device", default="", metavar="NAME", help="Device model."),
        click.option("--dtype", default="", metavar="DTYPE", help="E.g. float32."),
        click.option(
            "--shape",
            default="",
            metavar="SHAPE",
            help="Of an argument, or named in the description; ? for any extent, e.g. 1x56x56x64, 1x?x?x64, 3x3.",
        ),
        click.option("--sm-percent", type=int, metavar="P", help="Share, exactly."),
        click.option("--min-sm-percent", type=int, metavar="P", help="Share, at least."),
        click.option("--max-sm-percent", type=int, metavar="P", help="Share, at most."),
        click.option(
            "--nearest-share", type=int, metavar="P", help="For each operator and device, only the share nearest to P."
        ),
        click.option("--sm-count", type=int, metavar="N", help="SMs (or cores) that the worker saw."),
        click.option("--team", default="", metavar="TEAM", help="Team."),
        click.option("--job", default="", metavar="JOB", help="Job."),
        click.option("--verified", is_flag=True, help="Only records measured again alone on the device."),
        click.option("--since", metavar="AGE", help="Not older than, e.g. 12h or 30d."),
        click.option("--tag", multiple=True, metavar="KEY=VALUE", help="With this tag; repeatable."),
    ]
    for option in reversed(options):
        run = option(run)
    return run
