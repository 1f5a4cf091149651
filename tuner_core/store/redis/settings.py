"""What the store demands of a Redis server before it trusts it with records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner_core.errors import StoreError

OLDEST_VERSION = (6, 2)
_WAITAOF_VERSION = (7, 2)


def check_version(version: str, name: str, *, wait_aof: bool = False) -> None:
    """Raise StoreError for a Redis that is too old, for the store or for ``wait_aof``."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise StoreError(f"Redis {name} has version {version}: the store needs {oldest} or newer")
    if wait_aof and numbers < _WAITAOF_VERSION:
        oldest = ".".join(map(str, _WAITAOF_VERSION))
        raise StoreError(
            f"Redis {name} has version {version}: wait_aof needs {oldest} or newer; leave it out and set "
            "appendfsync to always"
        )


def volatile_because(config: Mapping[str, str] | None, info: Mapping[str, Any]) -> str | None:
    """Why this server might forget records, or None.

    Args:
        config: Of ``CONFIG GET``: ``maxmemory``, ``maxmemory-policy``, ``save``, ``appendonly``; None where the user
            may not read it, as with many hosted services.
        info: Of ``INFO``.
    """
    config = config or {}
    maxmemory = int(config.get("maxmemory", info.get("maxmemory", 0)) or 0)
    policy = str(config.get("maxmemory-policy", info.get("maxmemory_policy", "noeviction")))
    if maxmemory and policy != "noeviction":
        return f"maxmemory-policy is {policy}, so it deletes records when it is full: set it to noeviction"
    appendonly = str(config.get("appendonly", "yes" if info.get("aof_enabled") else "no"))
    if appendonly == "yes":
        return None
    if "save" not in config:
        return "appendonly is no and the setting save cannot be read: set appendonly to yes"
    if not config["save"].strip():
        return "appendonly is no and save is empty, so a restart forgets everything: set appendonly to yes"
    return None


def refusal(reason: str, name: str) -> StoreError:
    """The error for a server that might forget."""
    return StoreError(f"Redis {name}: {reason}; or accept a store that may forget with --allow-volatile-store")
