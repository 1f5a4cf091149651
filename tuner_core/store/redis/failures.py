"""Redis' errors as one-line errors of the product."""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Iterator

import redis
from redis.sentinel import MasterNotFoundError

from tuner_core.errors import StoreError, TunerError, UnavailableError

# redis-py takes the first word off errors that it has a class for
_CLASSES: dict[type[Exception], str] = {
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.TryAgainError: "TRYAGAIN",
}
# what a server says that cannot take a write at the moment but will again
_PASSING = {
    "OOM": "is full (maxmemory): raise maxmemory or prune records",
    "LOADING": "is loading its data",
    "READONLY": "is a replica at the moment (failing over?)",
    "MASTERDOWN": "has lost its master",
    "CLUSTERDOWN": "is a cluster with slots that nobody serves",
    "TRYAGAIN": "is moving slots",
    "MISCONF": "cannot write its data to disk and refuses writes",
    "NOREPLICAS": "has too few replicas and refuses writes",
    "BUSY": "is busy with a script",
}


def explain(error: Exception, name: str) -> TunerError:
    """The product's error for one of Redis'.

    Args:
        error: A ``redis.RedisError`` or an error of the connection.
        name: The store, without secrets.
    """
    text = " ".join(str(error).split())
    text = text.partition(" of pipeline caused error: ")[2] or text
    lower = text.lower()
    word = _CLASSES.get(type(error), text.partition(" ")[0])
    if isinstance(error, redis.AuthenticationError) or word in ("NOAUTH", "WRONGPASS"):
        if "required" in lower or word == "NOAUTH" or "without any password" in lower:
            if "without any password" in lower:
                return StoreError(f"Redis {name} wants no password: leave it out of the store's URL")
            return StoreError(f"Redis {name} wants a password: give redis://USER:PASSWORD@HOST")
        return StoreError(f"Redis {name} refuses the user or the password: check the store's URL")
    if isinstance(error, redis.exceptions.NoPermissionError) or word == "NOPERM":
        return StoreError(f"Redis {name}: the user may not do what the store needs ({text}): extend its ACL")
    if isinstance(error, MasterNotFoundError):
        if "NOAUTH" in text or "WRONGPASS" in text or "authentication" in lower or "password pair" in lower:
            return StoreError(
                f"Redis {name}: a sentinel refuses the user or the password: check sentinel_password_file"
            )
        reasons = ", ".join(dict.fromkeys(re.findall(r"\w+Error\(['\"](.*?)['\"]\)", text)))
        return UnavailableError(
            f"Redis {name}: no sentinel names a master that is up ({reasons[:200] or 'none knows the name'}): "
            "is the name right, and do they run?"
        )
    if "sentinel" in lower and "unknown command" in lower:
        return StoreError(f"Redis {name} is no sentinel: give the sentinels' ports, or use redis:// for the server")
    if "cluster support disabled" in lower or "cluster mode is not enabled" in lower:
        return StoreError(f"Redis {name} is no cluster: use redis:// instead of redis+cluster://")
    if word == "MOVED" or isinstance(error, redis.exceptions.MovedError):
        if "+cluster" in name:
            return UnavailableError(f"Redis {name} {_PASSING['TRYAGAIN']}")
        return StoreError(f"Redis {name} is part of a cluster: use redis+cluster:// instead of redis://")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return StoreError(
                f"Redis {name}: its certificate is not trusted ({cause.verify_message}): give its authority, "
                "rediss://HOST/0?ca=FILE"
            )
        cause = cause.__cause__ or cause.__context__
    if "certificate" in lower and "verify" in lower:
        return StoreError(f"Redis {name}: its certificate is not trusted: give its authority, rediss://HOST/0?ca=FILE")
    if "ssl" in lower and ("wrong version number" in lower or "record layer" in lower or "eof" in lower):
        return StoreError(f"Redis {name} does not speak TLS on this port: use redis:// or its TLS port")
    if word in _PASSING:
        return UnavailableError(f"Redis {name} {_PASSING[word]}")
    if isinstance(error, redis.TimeoutError):
        other = ", does it speak TLS on this port" if name.startswith("rediss") else ""
        return UnavailableError(f"Redis {name} does not answer in time: is it overloaded or stopped{other}?")
    if isinstance(error, redis.exceptions.RedisClusterException):
        return UnavailableError(f"no node of the Redis cluster {name} can be reached ({text[:200]})")
    if isinstance(error, redis.ConnectionError | OSError):
        return UnavailableError(
            f"Redis {name} cannot be reached ({text[:200]}): is it running, is TLS (rediss://) right?"
        )
    return StoreError(f"Redis {name} failed: {text[:300]}")


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn Redis' errors inside into the product's."""
    try:
        yield
    except (redis.RedisError, redis.exceptions.RedisClusterException, OSError) as error:  # the second is no RedisError
        raise explain(error, name) from error
