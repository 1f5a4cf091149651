"""Bodies and traces compressed with zlib, on disk and on the wire; decompression is bounded."""

from __future__ import annotations

import zlib

from tuner_core.errors import InvalidRecordError

MAX_BODY_BYTES = 32 << 20
MAX_TRACE_BYTES = 8 << 20


def pack(text: str) -> bytes:
    """The text's UTF-8 bytes, compressed."""
    return zlib.compress(text.encode(), 6)


def unpack(blob: bytes, *, limit: int, what: str) -> str:
    """The text that :func:`pack` compressed.

    Args:
        blob: Compressed bytes.
        limit: The most bytes that may come out: a small message must not fill the memory.
        what: Name of the thing for the error.

    Raises:
        InvalidRecordError: Not zlib, cut short, not UTF-8, or larger than ``limit``.
    """
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(blob, limit + 1)
    except zlib.error as error:
        raise InvalidRecordError(f"the {what} is not valid zlib data ({error})") from None
    if len(raw) > limit:
        raise InvalidRecordError(f"the {what} is larger than {limit} bytes")
    if not stream.eof:
        raise InvalidRecordError(f"the {what} is cut short")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidRecordError(f"the {what} is not UTF-8") from None
