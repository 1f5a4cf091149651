"""Bodies and traces compressed with zlib, on disk and on the wire; decompression is bounded."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict

from tuner_core.errors import InvalidRecordError

MAX_BODY_BYTES = 32 << 20
MAX_TRACE_BYTES = 8 << 20

# what was unpacked a moment ago is packed again as it was: a server hands traces on between store and wire
_REMEMBERED = 4_096
_REMEMBERED_BYTES = 32_768
_packed: OrderedDict[str, bytes] = OrderedDict()
_lock = threading.Lock()


def pack(text: str) -> bytes:
    """The text's UTF-8 bytes, compressed."""
    return _packed.get(text) or zlib.compress(text.encode(), 6)


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
        text = raw.decode()
    except UnicodeDecodeError:
        raise InvalidRecordError(f"the {what} is not UTF-8") from None
    # not what a sender compressed badly, or put more behind
    if len(raw) <= _REMEMBERED_BYTES and not stream.unused_data and 2 * len(blob) < len(raw):
        with _lock:
            _packed[text] = blob
            while len(_packed) > _REMEMBERED:
                _packed.popitem(last=False)
    return text
