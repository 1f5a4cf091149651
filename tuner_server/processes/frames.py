"""Message framing between the server and its own child processes: a 4-byte length, then one JSON document.

JSON and not pickle: a child runs code that was generated from what a client sent, so nothing it says may become an
object in the server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("!I")


class FrameError(Exception):
    """The peer sent something that is not a frame."""


def encode(message: dict[str, Any]) -> bytes:
    """One message as bytes."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def _decode(body: bytes) -> dict[str, Any]:
    message = json.loads(body)
    if not isinstance(message, dict):
        raise FrameError("a message must be a JSON object")
    return message


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send one message, blocking."""
    sock.sendall(encode(message))


def _receive_exactly(sock: socket.socket, count: int) -> bytes | None:
    chunks: list[bytes] = []
    while count:
        chunk = sock.recv(min(count, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Receive one message, blocking; None when the peer has closed."""
    head = _receive_exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame announces {length} bytes, over the limit of {MAX_FRAME_BYTES}")
    body = _receive_exactly(sock, length)
    return None if body is None else _decode(body)


async def receive_async(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Receive one message; None when the peer has closed."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame announces {length} bytes, over the limit of {MAX_FRAME_BYTES}")
        return _decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
