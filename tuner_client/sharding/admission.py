"""Which of the named instances can take part in a job, and why the others cannot. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tuner_client.places import places_of
from tuner_core.errors import ConflictError, UsageError
from tuner_core.model import PROTOCOL, TVM_VERSION, canonical_json, target_digest

if TYPE_CHECKING:
    from tuner_core.proto.tuner.v1 import host_pb2

_KINDS = {"llvm": "cpu", "cuda": "cuda"}


@dataclass(frozen=True)
class HostFacts:
    """What an instance said of itself, at the job's share.

    Attributes:
        address: Where it was reached.
        instance: Its own name; the same one at two addresses is one server.
        shares: Shares that its workers have.
        sm_count, target_json: At the job's share.
        others: The same of its devices of other models.
    """

    address: str
    instance: str
    protocol: str
    tvm_version: str
    device_kind: str
    device_model: str
    device_arch: str
    sm_count: int
    target_json: str
    shares: frozenset[int] = frozenset()
    store: str = ""
    others: tuple[HostFacts, ...] = ()

    def at(self, target_json: str | None) -> HostFacts:
        """These facts for the devices that have a target; without a target, or without such devices, as they are."""
        if target_json is None:
            return self
        wanted = target_digest(target_json)
        here = (one for one in (self, *self.others) if one.target_json)
        return next((one for one in here if target_digest(one.target_json) == wanted), self)


@dataclass(frozen=True)
class JobFacts:
    """What every instance of a job has to match, so that its records are comparable."""

    sm_percent: int
    target_json: str
    device_model: str
    sm_count: int


@dataclass(frozen=True)
class Admission:
    """Who takes part; ``left_out`` has the reason by address."""

    job: JobFacts
    admitted: tuple[HostFacts, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def facts_of(address: str, host: host_pb2.GetHostResponse) -> HostFacts:
    """The facts in an answer to GetHost."""
    found = HostFacts(
        address=address,
        instance=host.instance,
        protocol=host.protocol,
        tvm_version=host.tvm_version,
        device_kind="",
        device_model="",
        device_arch="",
        sm_count=host.sm_count,
        target_json="",
        shares=frozenset(worker.sm_percent for worker in host.workers),
        store=host.store,
    )
    here = [
        replace(
            found,
            device_kind=place.device_kind,
            device_model=place.device_model,
            device_arch=place.device_arch,
            sm_count=place.sm_count,
            target_json=canonical_json(json.loads(place.target_json)) if place.target_json else "",
        )
        for place in places_of(host)
    ]
    return replace(here[0], others=tuple(here[1:])) if here else found


def admit(hosts: Sequence[HostFacts], *, sm_percent: int, target_json: str | None) -> Admission:
    """Decide who takes part.

    Args:
        hosts: The instances that answered, in the order in which they were named.
        sm_percent: The job's share.
        target_json: The target that was asked for; None: the instances' own.

    Raises:
        UsageError: Different devices, and no target says which of them is meant.
        ConflictError: Nobody is left.
    """
    left_out: dict[str, str] = {}
    fit: list[HostFacts] = []
    for host in (one.at(target_json) for one in hosts):
        reason = _twice(host, fit) or _unfit(host, sm_percent, target_json)
        if reason:
            left_out[host.address] = reason
        else:
            fit.append(host)
    models: dict[str, list[str]] = {}
    for host in fit:
        models.setdefault(host.device_model, []).append(host.address)
    if len(models) > 1 and target_json is None:
        named = "; ".join(f"{model}: {', '.join(addresses)}" for model, addresses in models.items())
        raise UsageError(
            f"the servers have different devices ({named}); say which one to tune for with --target JSON, "
            "or name only servers of one kind"
        )
    if not fit:
        reasons = "; ".join(f"{address}: {reason}" for address, reason in left_out.items())
        raise ConflictError(f"no server can take part in this job ({reasons})")
    first = fit[0]
    job = JobFacts(sm_percent, target_json or first.target_json, first.device_model, first.sm_count)
    admitted = []
    for host in fit:
        reason = mismatch(host, job, target_given=target_json is not None)
        if reason:
            left_out[host.address] = reason
        else:
            admitted.append(host)
    return Admission(job, tuple(admitted), left_out)


def mismatch(host: HostFacts, job: JobFacts, *, target_given: bool = True) -> str:
    """Why an instance cannot measure for a job, or nothing."""
    host = host.at(job.target_json)
    if reason := _unfit(host, job.sm_percent, job.target_json if target_given else None):
        return reason
    if host.device_model != job.device_model:
        return f"has a {host.device_model}, the job tunes for {job.device_model}"
    if host.sm_count != job.sm_count:
        return f"has {host.sm_count} SMs or cores at {job.sm_percent} %, the job tunes for {job.sm_count}"
    if not target_given and host.target_json != job.target_json:
        return "has another target than the first server"
    return ""


def _twice(host: HostFacts, others: Sequence[HostFacts]) -> str:
    same = next((other for other in others if host.instance and other.instance == host.instance), None)
    return f"is the same server as {same.address}" if same else ""


def _unfit(host: HostFacts, sm_percent: int, target_json: str | None) -> str:
    if host.protocol != PROTOCOL:
        return f"speaks protocol {host.protocol or 'unknown'}, this client {PROTOCOL}"
    if host.tvm_version != TVM_VERSION:
        return f"has TVM {host.tvm_version}, this client {TVM_VERSION}"
    if not host.device_model:
        return "has no device"
    if host.shares and sm_percent not in host.shares:
        offered = ", ".join(f"{share} %" for share in sorted(host.shares))
        return f"offers {offered} of its device, not {sm_percent} %"
    if target_json is not None:
        return _other_target(host, json.loads(target_json))
    return ""


def _other_target(host: HostFacts, target: Mapping[str, Any]) -> str:
    kind = str(target.get("kind", ""))
    if _KINDS.get(kind, kind) != host.device_kind:
        return f"has a {host.device_kind} device, the target is {kind}"
    arch = target.get("arch")
    own = json.loads(host.target_json or "{}").get("arch", host.device_arch)
    if arch and own and arch != own:
        return f"has architecture {own}, the target is {arch}"
    return ""
