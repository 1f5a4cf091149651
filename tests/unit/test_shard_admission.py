"""Which of the named servers can take part in a job, and what is said of the others."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from tuner_client.sharding.addresses import expand, is_fleet
from tuner_client.sharding.admission import HostFacts, admit, facts_of, mismatch
from tuner_core.errors import ConflictError, UnavailableError, UsageError
from tuner_core.model import PROTOCOL, TVM_VERSION, canonical_json
from tuner_core.proto.tuner.v1 import host_pb2
from tuner_core.transport.options import ConnectionOptions

SM90 = canonical_json({"kind": "cuda", "arch": "sm_90"})
H200 = HostFacts(
    address="a:1",
    instance="one",
    protocol=PROTOCOL,
    tvm_version=TVM_VERSION,
    device_kind="cuda",
    device_model="NVIDIA H200",
    device_arch="sm_90",
    sm_count=32,
    target_json=SM90,
    shares=frozenset({25}),
)


def another(**changes: object) -> HostFacts:
    return dataclasses.replace(H200, **{"address": "b:1", "instance": "two", **changes})  # type: ignore[arg-type]


def reason(**changes: object) -> str:
    found = admit([H200, another(**changes)], sm_percent=25, target_json=None)
    assert [host.address for host in found.admitted] == ["a:1"]
    return found.left_out["b:1"]


def test_equal_instances_take_part() -> None:
    found = admit([H200, another()], sm_percent=25, target_json=None)
    assert [host.address for host in found.admitted] == ["a:1", "b:1"]
    assert found.job.target_json == SM90
    assert not found.left_out


def test_a_server_with_devices_of_two_models_takes_part_with_the_one_that_the_job_tunes_for() -> None:
    place = host_pb2.Place(device_model="NVIDIA L4", device_kind="cuda", target_json='{"kind":"cuda","arch":"sm_89"}')
    fitting = host_pb2.Place(
        device_model="NVIDIA H200", device_kind="cuda", device_arch="sm_90", target_json=SM90, sm_count=32
    )
    answer = host_pb2.GetHostResponse(
        instance="two", protocol=PROTOCOL, tvm_version=TVM_VERSION, places=[place, fitting], target_json="{}"
    )
    both = facts_of("b:1", answer)
    assert both.device_model == "NVIDIA L4"
    for hosts, target in (([H200, both], SM90), ([both, H200], SM90)):
        found = admit(hosts, sm_percent=25, target_json=target)
        assert {host.address for host in found.admitted} == {"a:1", "b:1"}
        assert {(host.device_model, host.sm_count) for host in found.admitted} == {("NVIDIA H200", 32)}
    assert mismatch(both, found.job, target_given=False) == ""


def test_who_does_not_match_is_left_out_with_the_reason() -> None:
    assert reason(protocol="tuner.v2") == f"speaks protocol tuner.v2, this client {PROTOCOL}"
    assert reason(shares=frozenset({50})) == "offers 50 % of its device, not 25 %"
    assert reason(sm_count=33) == "has 33 SMs or cores at 25 %, the job tunes for 32"
    assert reason(tvm_version="0.26") == f"has TVM 0.26, this client {TVM_VERSION}"
    assert reason(instance="one") == "is the same server as a:1"


def test_different_devices_need_a_target_that_says_which_is_meant() -> None:
    other = another(device_model="NVIDIA L4", device_arch="sm_89", target_json='{"arch":"sm_89","kind":"cuda"}')
    with pytest.raises(UsageError, match=r"NVIDIA H200: a:1; NVIDIA L4: b:1.*--target"):
        admit([H200, other], sm_percent=25, target_json=None)
    found = admit([other, H200], sm_percent=25, target_json=SM90)
    assert [host.address for host in found.admitted] == ["a:1"]
    assert found.left_out == {"b:1": "has architecture sm_89, the target is sm_90"}


def test_a_job_that_nobody_can_measure_is_refused_with_every_reason() -> None:
    with pytest.raises(ConflictError, match=r"a:1: offers 25 %.*b:1: offers 25 %"):
        admit([H200, another()], sm_percent=50, target_json=None)


def test_an_address_named_twice_is_used_once() -> None:
    found, notes = expand(["a:1", "b:1", "a:1"], ConnectionOptions)
    assert [options.address for options in found] == ["a:1", "b:1"]
    assert notes == ["a:1 was named twice; it is used once"]


def test_every_address_of_a_dns_name_is_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*stream, ("10.0.0.2", 50061)), (*stream, ("10.0.0.1", 50061)), (*stream, ("10.0.0.2", 50061))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    servers, _ = expand(["dns:///tuners.example:50061"], lambda address: ConnectionOptions(address, tls=True))
    assert [options.address for options in servers] == ["10.0.0.1:50061", "10.0.0.2:50061"]
    assert {options.tls_name for options in servers} == {"tuners.example"}  # what the certificate bears
    assert is_fleet(["dns:///tuners.example:50061"]) and not is_fleet(["tuners.example:50061"])


def test_a_name_without_an_address_is_one_clear_line() -> None:
    with pytest.raises(UnavailableError, match=r"dns:///nowhere\.invalid:1: the name has no address"):
        expand(["dns:///nowhere.invalid:1"], ConnectionOptions)
