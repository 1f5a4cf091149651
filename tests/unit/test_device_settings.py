"""How devices and their shares are said, by flags and in the file, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner_core.errors import UsageError
from tuner_server.config import DeviceSettings, device_settings

GENERAL = DeviceSettings(sm_percent=25, workers=4)

PRINT_DEVICES = """
import dataclasses, json, tuner_server.__main__ as main
async def show(config, ready_fd):
    print(json.dumps([dataclasses.asdict(settings) for settings in config.devices]))
    return 0
main._serve = show
main.main()
"""


def devices(*arguments: str) -> list[dict[str, Any]]:
    run = subprocess.run([sys.executable, "-c", PRINT_DEVICES, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded: list[dict[str, Any]] = json.loads(run.stdout)
    return loaded


def test_every_device_of_the_list_has_its_own_division_and_the_rest_from_the_general_settings() -> None:
    listed = yaml.safe_load(
        """
        - {device: "cuda:0", partitions: [50, 25, 25]}
        - {device: "cuda:GPU-1234", sm-percent: 50, workers: 2, mps: external, oversubscribe: true}
        - cuda:2
        - {device: cpu, mps: off}
        - {device: "cuda:3", pause-builds: never}
        """
    )
    assert device_settings(listed, GENERAL) == (
        DeviceSettings("cuda:0", partitions=(50, 25, 25)),
        DeviceSettings("cuda:GPU-1234", 50, 2, mps="external", oversubscribe=True),
        DeviceSettings("cuda:2", 25, 4),
        DeviceSettings("cpu", 25, 4, mps="off"),
        DeviceSettings("cuda:3", 25, 4, pause_builds="never"),
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "must be a list"),
        ("cuda:0", "must be a list"),
        ([{"partitions": [50]}], "needs a device"),
        ([{"device": "cuda:0", "share": 3}], "cuda:0 has an unknown setting: share; known: device, mps"),
        ([{"device": "cuda:0", "partitions": "half"}], r"partitions of cuda:0 wants shares in percent, e.g. \[50, 25"),
        ([{"device": "cuda:0", "partitions": [50.5]}], "partitions of cuda:0 wants shares"),
        ([{"device": "cuda:0", "partitions": [50, 0]}], "every share must be 1 to 100, not 0"),
        ([{"device": "cuda:0", "workers": "two"}], "workers of cuda:0 wants a whole number, not 'two'"),
        ([{"device": "cuda:0", "pause-builds": "no"}], "pause_builds of cuda:0 wants auto, always or never, not 'no'"),
        ([{"device": "cuda:0", "mps": "on"}], "mps of cuda:0 wants auto, external or off"),
        ([{"device": "cuda:0", "partitions": [50], "workers": 2}], "partitions of cuda:0 stand for sm_percent and wor"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_the_device_and_the_setting(entries: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        device_settings(entries, GENERAL)


def test_device_may_be_repeated_and_the_flags_hold_for_each_and_go_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("partitions: [50, 25, 25]\ndevices: [{device: cpu, partitions: [50, 50]}, cuda:1]\n")
    own = [(entry["device"], entry["partitions"]) for entry in devices("--config", str(config))]
    assert own == [("cpu", [50, 50]), ("cuda:1", [50, 25, 25])]
    flags = devices("--config", str(config), "--device", "cuda:2", "--device", "cuda:3")
    assert [(entry["device"], entry["partitions"]) for entry in flags] == [
        ("cuda:2", [50, 25, 25]),
        ("cuda:3", [50, 25, 25]),
    ]
    (plain,) = devices("--partitions", "50,25")
    assert (plain["device"], plain["partitions"]) == ("auto", [50, 25])
    config.write_text("device: cpu\nsm-percent: 50\n")
    (filed,) = devices("--config", str(config))
    assert (filed["device"], filed["sm_percent"]) == ("cpu", 50)
