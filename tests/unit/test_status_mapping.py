"""What a servicer raises is what a client raises, over real gRPC."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest

from tests.contract.conftest import serving
from tuner_core import errors
from tuner_core.errors import TunerError, UnavailableError
from tuner_core.model import RecordKey
from tuner_core.proto.tuner.v1 import records_pb2, records_pb2_grpc
from tuner_core.store.interface import RecordFilter, RecordStore
from tuner_core.store.remote import RemoteStore

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, TunerError)]


class FailingStore(RecordStore):
    """Raises one error whatever it is asked."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise self._error

    commit = get = get_workload = top = query = follow = tag = stats = prune = _fail

    def close(self) -> None:
        pass


@pytest.mark.parametrize("cls", CLASSES)
def test_each_error_arrives_as_itself_in_one_line(cls: type[TunerError]) -> None:
    with (
        serving(FailingStore(cls("no more\nspace, ünfortunately"))) as address,
        grpc.insecure_channel(address) as channel,
    ):
        with pytest.raises(TunerError) as raised:
            RemoteStore(channel, address=address).get("0" * 64)
        assert type(raised.value) is cls
        assert "\n" not in str(raised.value)
        assert str(raised.value) == "no more space, ünfortunately"


def test_an_error_in_a_stream_arrives_as_itself_too() -> None:
    error = UnavailableError("the store went away")
    with serving(FailingStore(error)) as address, grpc.insecure_channel(address) as channel:
        store = RemoteStore(channel, address=address)
        for stream in (store.stream(RecordFilter()), store.following(RecordFilter())):
            with pytest.raises(UnavailableError, match="the store went away"):
                next(stream)


def test_a_bug_is_logged_and_does_not_show_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FailingStore(KeyError("secret"))) as address, grpc.insecure_channel(address) as channel:
        with caplog.at_level(logging.ERROR, "tuner_server.services.status"), pytest.raises(TunerError) as raised:
            RemoteStore(channel, address=address).query(RecordFilter())
        assert "secret" not in str(raised.value)
        assert "QueryRecords" in str(raised.value)
        assert "KeyError: 'secret'" in caplog.text


def test_a_request_without_its_key_is_refused() -> None:
    with serving(FailingStore(AssertionError())) as address, grpc.insecure_channel(address) as channel:
        stub = records_pb2_grpc.RecordServiceStub(channel)
        for method, request in (
            (stub.TopRecords, records_pb2.TopRecordsRequest()),
            (stub.PruneRecords, records_pb2.PruneRecordsRequest()),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                method(request, timeout=10)
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_nobody_there_is_unavailable_and_says_where() -> None:
    with grpc.insecure_channel("127.0.0.1:9") as channel:
        store = RemoteStore(channel, timeout_s=5, address="127.0.0.1:9")
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
            store.top(RecordKey("0" * 64, "0" * 64, "x", 1))
