"""Which of a server's devices is meant: by its name, its model or its target."""

from __future__ import annotations

import json

from tuner_core.errors import ConflictError, UsageError
from tuner_core.model import target_digest
from tuner_core.proto.tuner.v1 import host_pb2 as pb


def places_of(host: pb.GetHostResponse) -> list[pb.Place]:
    """What the asked share is on a server, one place for devices of each model."""
    if host.places or not host.devices:
        return list(host.places)
    first = host.devices[0]  # a server that does not say has devices of one model
    names = [device.name or device.uuid for device in host.devices]
    return [pb.Place(
        device_model=first.model, device_kind=first.kind, device_arch=first.arch, target_json=host.target_json,
        sm_count=host.sm_count or first.sm_count, devices=names, on_offer=True,
    )]  # fmt: skip


def choose_place(
    host: pb.GetHostResponse, address: str, *, device: str | None = None, target_json: str | None = None
) -> pb.Place:
    """The place that is meant.

    Args:
        host: The server's answer, at the share.
        address: Of the server, for texts.
        device: Model, UUID or name on the server (``cuda:1``); None: any.
        target_json: TVM target; a place with this very target comes before others of its kind. None: any.

    Returns:
        The only place that fits. Of several, one with partitions of the share comes before one without.

    Raises:
        ConflictError: The server has no such device.
        UsageError: It has several, and nothing says which.
    """
    places = places_of(host)
    if not places:
        raise ConflictError(f"the server at {address} has no device")
    fit = [place for place in places if device is None or _is_named(place, host, device)]
    if not fit:
        raise ConflictError(f"the server at {address} has no {device}; it has {_listed(places)}")
    if target_json is not None:
        same = [place for place in fit if target_digest(place.target_json) == target_digest(target_json)]
        kind = json.loads(target_json).get("kind")
        fit = same or [place for place in fit if json.loads(place.target_json).get("kind") == kind] or fit
    fit = [place for place in fit if place.on_offer] or fit
    if len(fit) > 1:
        raise UsageError(
            f"the server at {address} has several devices at {host.sm_percent} %: {_listed(fit)}; "
            "say which with --device NAME or --target JSON"
        )
    return fit[0]


def first_device(host: pb.GetHostResponse, place: pb.Place) -> pb.Device:
    """One of the devices of a place."""
    return next((device for device in host.devices if device.name in place.devices), host.devices[0])


def _is_named(place: pb.Place, host: pb.GetHostResponse, device: str) -> bool:
    wanted = device.lower()
    uuids = [one.uuid.lower() for one in host.devices if one.name in place.devices]
    return wanted in (place.device_model.lower(), *(name.lower() for name in place.devices), *uuids)


def _listed(places: list[pb.Place]) -> str:
    return "; ".join(
        f"{place.device_model} ({', '.join(place.devices)}: {place.sm_count} "
        f"{'cores' if place.device_kind == 'cpu' else 'SMs'})"
        for place in places
    )
