"""Targets written in full, to tell whether two spellings mean the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import UsageError
from tuner_core.model import canonical_json


def expanded_target(target: Any) -> str:
    """Canonical JSON of a target with every attribute that TVM fills in (keys, triple, limits of the kind).

    ``{"kind": "llvm", "num-cores": 2}`` and what TVM writes into its databases for it become equal.

    Args:
        target: A ``tvm.target.Target``, a mapping, or JSON.

    Raises:
        UsageError: TVM does not know such a target.
    """
    if isinstance(target, Mapping):
        return _expanded(json.dumps(dict(target)))
    return _expanded(str(target))


@functools.lru_cache(maxsize=256)
def _expanded(text: str) -> str:
    load_tvm()
    from tvm.target import Target

    try:
        attributes = json.loads(str(Target(json.loads(text))))
    except Exception as error:  # TVM raises ValueError, TypeError or InternalError here
        raise UsageError(f"TVM does not know the target {text}: {str(error).strip().splitlines()[-1][:200]}") from None
    return canonical_json({name: value for name, value in attributes.items() if value != ""})
