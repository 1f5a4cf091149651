"""Which of a server's devices a client builds for, looks records up for, and imports as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.integration.tiny_models import write_tiny_cnn
from tuner_client.places import choose_place, first_device
from tuner_core.errors import ConflictError, UsageError
from tuner_core.proto.tuner.v1 import host_pb2 as pb
from tuner_core.proto.tuner.v1 import host_pb2_grpc, tuning_pb2, tuning_pb2_grpc

H200 = pb.Place(
    device_model="NVIDIA H200",
    device_kind="cuda",
    target_json='{"kind": "cuda", "arch": "sm_90"}',
    sm_count=32,
    devices=["cuda:0", "cuda:2"],
    on_offer=True,
)
L4 = pb.Place(
    device_model="NVIDIA L4",
    device_kind="cuda",
    target_json='{"kind": "cuda", "arch": "sm_89"}',
    sm_count=15,
    devices=["cuda:1"],
    on_offer=True,
)
CPU = pb.Place(
    device_model="AMD EPYC", device_kind="cpu", target_json='{"kind": "llvm"}', sm_count=2, devices=["cpu:0-7"]
)


def server(*places: pb.Place) -> pb.GetHostResponse:
    devices = [
        pb.Device(name=name, model=place.device_model, uuid=f"GPU-{name[-1]}")
        for place in places
        for name in place.devices
    ]
    return pb.GetHostResponse(places=places, devices=devices, sm_percent=25)


def chosen(*places: pb.Place, device: str | None = None, target: str | None = None) -> str:
    return choose_place(server(*places), "gpu:1", device=device, target_json=target).device_model


def test_one_model_needs_no_name() -> None:
    assert chosen(H200) == "NVIDIA H200"
    assert chosen(H200, target='{"kind": "cuda", "arch": "sm_80"}') == "NVIDIA H200"


def test_several_models_want_a_device_or_a_target_and_the_error_lists_them() -> None:
    with pytest.raises(UsageError) as error:
        chosen(H200, L4)
    assert str(error.value) == (
        "the server at gpu:1 has several devices at 25 %: NVIDIA H200 (cuda:0, cuda:2: 32 SMs); "
        "NVIDIA L4 (cuda:1: 15 SMs); say which with --device NAME or --target JSON"
    )
    for name in ("NVIDIA L4", "nvidia l4", "cuda:1", "GPU-1"):
        assert chosen(H200, L4, device=name) == "NVIDIA L4"
    assert chosen(H200, L4, target='{"arch":"sm_89","kind":"cuda"}') == "NVIDIA L4"
    assert chosen(H200, CPU, target='{"kind": "llvm", "num-cores": 4}') == "AMD EPYC"


def test_partitions_on_offer_come_before_a_device_that_would_be_divided_anew() -> None:
    assert chosen(CPU, L4) == "NVIDIA L4"
    assert chosen(CPU, L4, device="AMD EPYC") == "AMD EPYC"


def test_a_device_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ConflictError) as error:
        chosen(H200, CPU, device="cuda:7")
    assert str(error.value) == (
        "the server at gpu:1 has no cuda:7; it has NVIDIA H200 (cuda:0, cuda:2: 32 SMs); AMD EPYC (cpu:0-7: 2 cores)"
    )
    with pytest.raises(ConflictError, match="has no device"):
        chosen()


def test_the_facts_of_a_device_are_those_of_the_place() -> None:
    host = server(H200, L4)
    assert first_device(host, L4).uuid == "GPU-1"
    assert first_device(host, H200).uuid == "GPU-0"


class Host(host_pb2_grpc.HostServiceServicer):
    def GetHost(self, request: pb.GetHostRequest, context: object) -> pb.GetHostResponse:
        answer = server(H200, L4)
        answer.sm_percent = request.sm_percent
        return answer


class Jobs(tuning_pb2_grpc.TuningServiceServicer):
    def ListJobs(self, request: tuning_pb2.ListJobsRequest, context: object) -> tuning_pb2.ListJobsResponse:
        return tuning_pb2.ListJobsResponse()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    running = grpc.server(ThreadPoolExecutor(2))
    host_pb2_grpc.add_HostServiceServicer_to_server(Host(), running)
    tuning_pb2_grpc.add_TuningServiceServicer_to_server(Jobs(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(None).wait()


def test_a_record_database_is_of_the_device_that_was_asked_for(address: str) -> None:
    from tuner_client import RecordDatabase

    for options in ({"device_model": "cuda:1"}, {"target": {"kind": "cuda", "arch": "sm_89"}}):
        database = RecordDatabase(address, sm_percent=25, **options)
        database.close()
        assert (database.place.device_model, database.place.sm_count) == ("NVIDIA L4", 15)
        assert json.loads(database.place.target_json)["arch"] == "sm_89"
    with pytest.raises(UsageError, match=r"several devices at 25 %: NVIDIA H200 .*; NVIDIA L4 .*; say which"):
        RecordDatabase(address, sm_percent=25)
    with pytest.raises(ConflictError, match="has no Tesla T4; it has NVIDIA H200"):
        RecordDatabase(address, sm_percent=25, device_model="Tesla T4")


def test_import_and_build_say_that_they_need_a_device(address: str, tmp_path: Path) -> None:
    from tuner_client import Client

    model = tmp_path / "tiny.onnx"
    write_tiny_cnn(model)
    (tmp_path / "folder").mkdir()
    with Client(address, data_dir=tmp_path) as client:
        for device, error, says in (
            (None, UsageError, "say which with --device"),
            ("cpu", ConflictError, "has no cpu; it has NVIDIA H200"),
        ):
            with pytest.raises(error, match=says):
                client.import_records(tmp_path / "folder", sm_percent=25, device=device)
            with pytest.raises(error, match=says):
                client.build(model, sm_percent=25, output=tmp_path / "tiny.so", device=device)
