"""The search process: many sessions, one request at a time. Role ``search`` of the prefork process."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import Any

import xgboost  # noqa: F401 - before the fork: every search process would import it over its first ranking, for seconds

from tuner_core.errors import UsageError
from tuner_server.processes.child import WorkError, serve
from tuner_server.processes.limits import limit_resources
from tuner_server.search.experience import Experience
from tuner_server.search.messages import KnownTrial, Lesson, SearchFailed, SearchSettings
from tuner_server.search.session import SearchSession


class _Sessions:
    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._open: dict[str, SearchSession] = {}
        self._experience: dict[tuple[str, str], Experience] = {}
        self._shared_with: dict[str, tuple[str, str]] = {}

    def open(self, args: dict[str, Any]) -> dict[str, Any]:
        experience = None
        if args["shared_with"] is not None:
            group = self._shared_with[args["session"]] = (args["target"], args["shared_with"])
            experience = self._experience.setdefault(group, Experience())
            experience.learn(Lesson(*row) for row in args["lessons"])
        try:
            session = SearchSession(
                args["body"],
                args["target"],
                replace(self._settings, cost_weight=args["cost_weight"]),
                args["seed"],
                _trials(args["known"]),
                experience,
                args["seeds"],
            )
        except UsageError as error:
            raise WorkError("search_failed", str(error)) from None
        self._open[args["session"]] = session
        return {"knobs": session.knobs}

    def generate(self, args: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"traces": self._get(args).generate(args["count"], args["following"], args["continued"])}
        except SearchFailed as error:
            raise WorkError("search_failed", str(error)) from None

    def report(self, args: dict[str, Any]) -> dict[str, Any]:
        self._get(args).report(_trials(args["trials"]))
        return {}

    def close(self, args: dict[str, Any]) -> dict[str, Any]:
        if (session := self._open.pop(args["session"], None)) is not None:
            session.close()
        group = self._shared_with.pop(args["session"], None)
        if group is not None and group[1] and group not in self._shared_with.values():
            del self._experience[group]
        return {}

    def _get(self, args: dict[str, Any]) -> SearchSession:
        try:
            return self._open[args["session"]]
        except KeyError:
            raise WorkError("unknown_session", f"no session {args['session']} in this process") from None


def _trials(rows: list[list[Any]]) -> list[KnownTrial]:
    return [KnownTrial(trace, median_us) for trace, median_us in rows]


def main(sock: socket.socket, config: dict[str, Any]) -> None:
    """Serve until the peer closes.

    Args:
        sock: Connected stream socket.
        config: ``settings``: :class:`SearchSettings` as JSON.
    """
    limit_resources()
    sessions = _Sessions(SearchSettings.from_json(config["settings"]))
    serve(
        sock,
        {
            "open": sessions.open,
            "generate": sessions.generate,
            "report": sessions.report,
            "close": sessions.close,
        },
    )
