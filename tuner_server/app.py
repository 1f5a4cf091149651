"""A server from start to stop: data directory, store, jobs, worker processes, gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import platform
import secrets
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tuner_core.datadir import DataDirLock
from tuner_core.errors import TunerError, UsageError
from tuner_core.proto.tuner.v1 import (
    host_pb2,
    host_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    records_pb2,
    records_pb2_grpc,
    tuning_pb2,
    tuning_pb2_grpc,
)
from tuner_core.store.interface import RecordStore
from tuner_core.store.open import open_server_store
from tuner_core.transport.options import SERVER_CHANNEL_OPTIONS
from tuner_server.config import ServerConfig, TlsFiles
from tuner_server.engine import Engine
from tuner_server.scheduler.journal import JobJournal
from tuner_server.scheduler.supervisor import JobSupervisor
from tuner_server.services.auth import Authenticator, read_tokens
from tuner_server.services.host import HostServicer
from tuner_server.services.leases import LeaseServicer
from tuner_server.services.records import RecordServicer
from tuner_server.services.tuning import TuningServicer

log = logging.getLogger(__name__)

SERVICES = (
    tuning_pb2.DESCRIPTOR.services_by_name["TuningService"].full_name,
    records_pb2.DESCRIPTOR.services_by_name["RecordService"].full_name,
    host_pb2.DESCRIPTOR.services_by_name["HostService"].full_name,
    leases_pb2.DESCRIPTOR.services_by_name["LeaseService"].full_name,
)


class Server:
    """One instance.

    Args:
        config: Its settings.

    Attributes:
        address: HOST:PORT that it listens on, once started.
        instance: Its name in reports and records.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.address = ""
        self.instance = f"{platform.node()}-{secrets.token_hex(2)}"
        self._lock: DataDirLock | None = None
        self._store: RecordStore | None = None
        self._journal: JobJournal | None = None
        self._engine: Engine | None = None
        self._jobs: JobSupervisor | None = None
        self._grpc: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None

    async def start(self) -> None:
        """Start everything, in the order in which things can go wrong cheaply.

        Raises:
            TunerError: One line says what is wrong; what had been started is stopped.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config = self.config
        _check_exposure(config)
        tokens = read_tokens(config.token_file) if config.token_file else {}
        credentials = _read_tls(config.tls) if config.tls else None
        self._lock = DataDirLock(config.data_dir)
        self._store = await asyncio.to_thread(
            open_server_store,
            config.store_url,
            config.data_dir / "spool.sqlite",
            allow_volatile=config.allow_volatile_store,
        )
        self._journal = await asyncio.to_thread(JobJournal, config.data_dir / "jobs.sqlite")
        self._engine = Engine(config)
        self._jobs = JobSupervisor(
            self._engine, self._store, self._journal, self.instance, auto_resume=not config.exit_with_parent
        )
        authenticator = Authenticator(tokens)
        self._grpc = grpc.aio.server(interceptors=[authenticator], options=SERVER_CHANNEL_OPTIONS)
        tuning_pb2_grpc.add_TuningServiceServicer_to_server(TuningServicer(self._jobs, authenticator), self._grpc)
        records_pb2_grpc.add_RecordServiceServicer_to_server(RecordServicer(self._store, authenticator), self._grpc)
        host_pb2_grpc.add_HostServiceServicer_to_server(
            HostServicer(self._engine, self._jobs, self.instance, config.store_url), self._grpc
        )
        leases_pb2_grpc.add_LeaseServiceServicer_to_server(
            LeaseServicer(self._jobs, authenticator, self.instance), self._grpc
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if config.reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        self.address = self._bind(credentials)
        if not config.lazy:
            await self._engine.start()
        await self._jobs.start()
        await self._grpc.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._lock.announce(self.address)
        log.info("%s listens on %s, store %s", self.instance, self.address, config.store_url.split("@")[-1])

    def _bind(self, credentials: grpc.ServerCredentials | None) -> str:
        assert self._grpc is not None
        listen = self.config.listen
        try:
            if credentials is not None:
                port = self._grpc.add_secure_port(listen, credentials)
            else:
                port = self._grpc.add_insecure_port(listen)
        except RuntimeError:
            port = 0
        if port == 0:
            raise TunerError(
                f"cannot listen on {listen}: the port is in use or the address is not this host's; "
                "choose another with --listen HOST:PORT"
            )
        return f"{listen.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Stop in order: say so, interrupt jobs with everything measured stored, end all processes, close the store."""
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        if self._jobs is not None:
            await self._jobs.stop()
        if self._grpc is not None:
            await self._grpc.stop(grace=1.0)
        if self._engine is not None:
            await self._engine.stop()
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.release()
        self._health = self._jobs = self._grpc = self._engine = self._store = self._journal = self._lock = None


def _check_exposure(config: ServerConfig) -> None:
    """Beyond loopback only with TLS, or knowingly without.

    Raises:
        UsageError: Neither TLS nor ``insecure``; or no HOST:PORT.
    """
    host, separator, port = config.listen.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen wants HOST:PORT, not {config.listen!r}")
    host = host.strip("[]")
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = ipaddress.ip_address(host).is_loopback
    if local or config.tls is not None:
        return
    if not config.insecure:
        raise UsageError(
            f"{config.listen} is reachable from other hosts: give --tls-cert and --tls-key, "
            "or --insecure on a network you trust"
        )
    log.warning("listening on %s without TLS: anyone who reaches it can read records and run jobs", config.listen)


def _read_tls(files: TlsFiles) -> grpc.ServerCredentials:
    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None

    return grpc.ssl_server_credentials(
        [(read(files.key), read(files.cert))],
        root_certificates=read(files.client_ca) if files.client_ca else None,
        require_client_auth=files.client_ca is not None,
    )
