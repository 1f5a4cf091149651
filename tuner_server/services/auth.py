"""Tokens: who calls, and for which team."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from tuner_core.errors import PermissionDeniedError, UsageError

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # subscripted only in the type stubs

_OPEN_METHODS = ("/grpc.health.v1.Health/",)


def read_tokens(path: Path) -> dict[str, str]:
    """Read a token file: one ``TOKEN TEAM`` per line, ``#`` begins a comment.

    Raises:
        UsageError: It cannot be read, or a line is malformed (named by number, without its text).
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the token file {path}: {error.strerror}") from None
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        if len(words) != 2 or len(words[0]) < 16:
            raise UsageError(f"line {number} of {path} is not a token of at least 16 characters and a team")
        tokens[words[0]] = words[1]
    if not tokens:
        raise UsageError(f"the token file {path} holds no token")
    return tokens


class Authenticator(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, when there are tokens at all.

    Args:
        tokens: Token to team; empty: an open server.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)

    def team(self, metadata: Any) -> str | None:
        """Team of a call, from its metadata; None when its token is missing or unknown, empty on an open server."""
        if not self._tokens:
            return ""
        for key, value in metadata or ():
            if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
                offered = value.removeprefix("Bearer ").encode()
                for token, team in self._tokens.items():
                    if hmac.compare_digest(token.encode(), offered):
                        return team
        return None

    def owner(self, metadata: Any, asked: str = "") -> str:
        """The team that a call acts for: the token's; on an open server the one that it names, empty for nobody's.

        Args:
            metadata: The call's.
            asked: Team that the request names.

        Raises:
            PermissionDeniedError: The token is another team's than the one that the request names.
        """
        team = self.team(metadata)
        if not team:
            return asked
        if asked and asked != team:
            raise PermissionDeniedError(f"this token is of team {team}, which may not act for team {asked}")
        return team

    def check_owner(self, metadata: Any, owner: str, what: str, asked: str = "") -> None:
        """Let only the owning team change something. On an open server, whoever names no team may change anything.

        Args:
            metadata: The call's.
            owner: Team that it belongs to; empty: nobody's, so that every team may.
            what: Its name, for the error.
            asked: Team that the request names.

        Raises:
            PermissionDeniedError: It belongs to another team.
        """
        team = self.owner(metadata, asked)
        if team and owner and team != owner:
            raise PermissionDeniedError(f"{what} belongs to team {owner}: team {team} may read it, not change it")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Let the call through, or answer it with UNAUTHENTICATED."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(_OPEN_METHODS) or self.team(handler_call_details.invocation_metadata) is not None:
            return handler
        return _refusal(handler)


def _refusal(handler: Handler | None) -> Handler:
    message = "this server wants a token: --token-file or TUNER_TOKEN"

    async def refuse(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    async def refuse_stream(_request: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        for _ in range(0):  # makes this the async generator that a stream of responses has to be
            yield
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    if handler is not None and handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse)
