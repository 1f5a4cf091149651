"""The client's side of one instance: its connection, and what is known of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tuner_client.sharding.admission import HostFacts, facts_of
from tuner_core.leases import messages as m
from tuner_core.proto.tuner.v1 import (
    host_pb2,
    host_pb2_grpc,
    leases_pb2_grpc,
    records_pb2_grpc,
    tuning_pb2,
    tuning_pb2_grpc,
)
from tuner_core.transport.aio import AioConnection

if TYPE_CHECKING:
    from tuner_core.transport.options import ConnectionOptions

FIRST_CONTACT_S = 10.0
HOST_TIMEOUT_S = 120.0
_CHANNEL = (("grpc.max_reconnect_backoff_ms", 1_000),)


class InstanceLink:
    """One instance.

    Args:
        options: Where it is.

    Attributes:
        facts: What it said of itself when it was last reached.
        left_out: Why it takes no part, for good.
        trouble: Why it cannot be reached now.
        incarnation, sequence: How far its event stream was read.
        cursor: How far its records were read.
        holds: Trial ids of the job that are in its store.
        commands: Leases to give, renew and revoke, in order.
        doing: What it does now, in its own words.
    """

    def __init__(self, options: ConnectionOptions) -> None:
        self.options = options
        self.address = options.address
        self.facts: HostFacts | None = None
        self.left_out = ""
        self.trouble = ""
        self.incarnation = ""
        self.sequence = 0
        self.cursor: str | None = None
        self.holds: set[str] = set()
        self.commands: asyncio.Queue[m.Grant | m.Renew | m.Revoke] = asyncio.Queue()
        self.doing = ""
        self.joined = False
        self.connect()

    def connect(self) -> None:
        """A new channel; nothing is sent yet."""
        self.connection = AioConnection(self.options, _CHANNEL)
        channel = self.connection.channel
        self.host = host_pb2_grpc.HostServiceStub(channel)
        self.tuning = tuning_pb2_grpc.TuningServiceStub(channel)
        self.leases = leases_pb2_grpc.LeaseServiceStub(channel)
        self.records = records_pb2_grpc.RecordServiceStub(channel)

    async def reconnect(self) -> None:
        """Give up the channel, whose connection may be dead without anybody having noticed, for a new one."""
        await self.connection.close()
        self.connect()

    async def ask(self, sm_percent: int, first_contact_s: float = FIRST_CONTACT_S) -> host_pb2.GetHostResponse:
        """What the instance offers.

        Raises:
            TunerError: It cannot be reached, or is no tuner-server.
        """
        # The first call is a cheap one with a short deadline: it tells a wrong port from a server that starts.
        await self.connection.call(self.tuning.ListJobs, tuning_pb2.ListJobsRequest(limit=1), first_contact_s)
        request = host_pb2.GetHostRequest(sm_percent=sm_percent)
        host: host_pb2.GetHostResponse = await self.connection.call(self.host.GetHost, request, HOST_TIMEOUT_S)
        self.facts = facts_of(self.address, host)
        return host
