"""Servers as people name them: twice, wrongly, of another kind. Those that fit are used, the others named with why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.replay_fleet import Fleet, Script, fleet
from tests.integration.tiny_models import write_tiny_cnn
from tests.redis_server import free_ports
from tuner_client.request import TuneRequest
from tuner_client.sharding.addresses import expand
from tuner_client.sharding.tuning import ShardedTuner, ShardingOptions
from tuner_core.errors import ConflictError, UnavailableError, UsageError
from tuner_core.transport.options import ConnectionOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    write_tiny_cnn(path)
    return path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("fleet")) as found:
        found.add(trial_s=0.02)
        found.add(protocol="tuner.v2")
        found.add(device="Other CPU")
        found.add(sm_percent=50)
        yield found


def tuner(folder: Path, script: Script, *named: str) -> ShardedTuner:
    """A client that is given these values of ``--server``."""
    found, notes = expand(named, ConnectionOptions)
    for note in notes:
        script.note(note)
    return ShardedTuner(ShardingOptions(tuple(found), heartbeat_s=1.0), folder, script)


def test_who_does_not_fit_is_left_out_with_the_reason_and_who_is_named_twice_is_used_once(
    servers: Fleet, model: Path, tmp_path: Path
) -> None:
    fits, newer, _, half = (server.address for server in servers.servers)
    port = fits.rpartition(":")[2]
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    script = Script()
    named = (fits, f"localhost:{port}", f"dns:///localhost:{port}", newer, half, nobody, fits)
    report = tuner(tmp_path, script, *named).run(TuneRequest(model, trials=24, sm_percent=100))
    assert (report.status, report.measured) == ("done", 24), report.error
    instances = {one.address: one for one in report.instances}
    # dns:/// stands for every address that the name has: the IPv6 one is another address of the same server, or refuses
    assert set(instances) - {f"[::1]:{port}"} == {fits, f"localhost:{port}", newer, half, nobody}
    assert instances[fits].trials == 24
    assert instances[f"localhost:{port}"].reason == f"is the same server as {fits}"
    assert instances[newer].reason == "speaks protocol tuner.v2, this client tuner.v1"
    assert instances[half].reason == "offers 50 % of its device, not 100 %"
    assert {one.state for address, one in instances.items() if address not in (fits, nobody, f"[::1]:{port}")} == {
        "left out"
    }
    assert instances[nobody].state == "connecting" and "connection refused" in instances[nobody].reason
    assert script.said(f"{fits} was named twice; it is used once")
    assert script.said(f"{newer} is left out: speaks protocol tuner.v2")
    assert script.said(f"cannot reach a tuner-server at {nobody}: connection refused")
    assert script.said("going on without it until it answers")


def test_different_devices_are_an_error_without_a_target_that_says_which(
    servers: Fleet, model: Path, tmp_path: Path
) -> None:
    fits, _, other, _ = (server.address for server in servers.servers)
    with pytest.raises(UsageError, match=f"different devices .Replayed CPU: {fits}; Other CPU: {other}.*--target"):
        tuner(tmp_path, Script(), fits, other).run(TuneRequest(model, trials=8))


def test_servers_of_which_none_can_be_reached_or_none_fits_are_one_error_with_the_reasons(
    servers: Fleet, model: Path, tmp_path: Path
) -> None:
    _, newer, _, half = (server.address for server in servers.servers)
    first, second = (f"127.0.0.1:{port}" for port in free_ports(2))
    with pytest.raises(UnavailableError, match=rf"{first}: connection refused.*and 1 more"):
        tuner(tmp_path, Script(), first, second).run(TuneRequest(model, trials=8))
    with pytest.raises(ConflictError, match=rf"{newer}: speaks protocol tuner\.v2.*{half}: offers 50 %"):
        tuner(tmp_path, Script(), newer, half).run(TuneRequest(model, trials=8, sm_percent=100))
