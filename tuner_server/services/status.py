"""From exceptions to gRPC status codes, in one place for all servicers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from tuner_core.errors import TunerError

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> None:
    if isinstance(error, TunerError):
        # several classes share a status; the trailer lets a client raise the same one again
        context.set_trailing_metadata((("tuner-error", type(error).__name__),))
        await context.abort(grpc.StatusCode[error.status], " ".join(str(error).split()))
    logger.exception("%s failed", method)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error in {method}: see the server's log")


def mapped(method: F) -> F:
    """Wrap a servicer's method so that what it raises reaches the client as a status with a one-line text.

    A :class:`TunerError` becomes its status; anything else is logged with its traceback and becomes ``INTERNAL``.

    Args:
        method: ``async def m(self, request, context)``: a coroutine, or an async generator for a stream of responses.
    """
    if inspect.isasyncgenfunction(method):

        @functools.wraps(method)
        async def stream(self: Any, request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async for response in method(self, request, context):
                    yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, method.__name__, error)

        return cast(F, stream)

    @functools.wraps(method)
    async def unary(self: Any, request: Any, context: Any) -> Any:
        try:
            return await cast(Awaitable[Any], method(self, request, context))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, method.__name__, error)

    return cast(F, unary)
