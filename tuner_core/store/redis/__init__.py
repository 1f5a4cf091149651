"""The shared record store: Redis 6.2 or newer, one server or a cluster."""

from tuner_core.store.redis.location import RedisLocation, parse_location
from tuner_core.store.redis.store import RedisStore

__all__ = ["RedisLocation", "RedisStore", "parse_location"]
