"""The exception tree of the product, and one table to and from gRPC status codes and exit codes.

Status codes are named, not imported: ``import grpc`` costs more than a ``--help`` may take.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PARTLY = 3


class TunerError(Exception):
    """An error that a user can act on: its text is one line saying what, why and what to do."""

    exit_code: ExitCode = ExitCode.FAILED
    status: str = "INTERNAL"


class UsageError(TunerError):
    """The request itself is wrong: a flag, an argument, a combination of them."""

    exit_code = ExitCode.USAGE
    status = "INVALID_ARGUMENT"


class ModelError(TunerError):
    """The model cannot be read, imported or tuned."""

    status = "INVALID_ARGUMENT"


class NotFoundError(TunerError):
    """A job, record or workload that was named does not exist."""

    status = "NOT_FOUND"


class ConflictError(TunerError):
    """The state of the server does not allow this: no such share on offer, draining, data directory in use."""

    status = "FAILED_PRECONDITION"


class AuthenticationError(TunerError):
    """No valid token."""

    status = "UNAUTHENTICATED"


class PermissionDeniedError(TunerError):
    """The token's team may not do this."""

    status = "PERMISSION_DENIED"


class UnavailableError(TunerError):
    """A server or store cannot be reached, or went away."""

    status = "UNAVAILABLE"


class DeadlineError(TunerError):
    """An answer did not come in time."""

    status = "DEADLINE_EXCEEDED"


class StoreError(TunerError):
    """The record store refuses or fails: newer schema, full disk, wrong password."""

    status = "FAILED_PRECONDITION"


class InvalidRecordError(TunerError):
    """A record or an imported line is malformed, or its trace does not fit its workload."""

    status = "INVALID_ARGUMENT"


_BY_STATUS: dict[str, type[TunerError]] = {
    "INVALID_ARGUMENT": UsageError,
    "NOT_FOUND": NotFoundError,
    "FAILED_PRECONDITION": ConflictError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
}


def from_status(code: str, details: str, name: str = "") -> TunerError:
    """The product's exception for a gRPC status.

    Args:
        code: Name of the status code that came back, e.g. ``NOT_FOUND``.
        details: The server's one-line text.
        name: Class that the server raised, from the ``tuner-error`` trailer: several classes share a status.
    """
    cls = next(
        (known for known in TunerError.__subclasses__() if known.__name__ == name and known.__module__ == __name__),
        _BY_STATUS.get(code, TunerError),
    )
    return cls(details or code.lower().replace("_", " "))
