"""Records as CSV (RFC 4180), one row each under one heading."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from tuner_core.model import Record

_COLUMNS = [field.name for field in dataclasses.fields(Record) if field.name != "trace"]


def record_csv(records: Iterable[Record]) -> str:
    """Every field but the trace. Times are ISO 8601 in UTC, lists and mappings JSON, what is not there is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for record in records:
        writer.writerow([_cell(name, getattr(record, name)) for name in _COLUMNS])
    return text.getvalue()


def _cell(name: str, value: Any) -> Any:
    if value is None:
        return ""
    if name == "created_at":
        return datetime.fromtimestamp(value, UTC).isoformat()
    if isinstance(value, bool):
        return str(value).lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return json.dumps(dict(value), ensure_ascii=False)
    if isinstance(value, list | tuple):
        return json.dumps(list(value))
    return value
