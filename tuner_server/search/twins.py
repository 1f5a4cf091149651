"""Candidates that differ only in how far loops may be unrolled, and become the same code all the same.

A limit of 512 steps and one of 1024 are the same where no loop has more than 512. Up to a quarter of a dense layer's
candidates are such twins. Siblings share everything up to the pass that unrolls: one of them is lowered that far, and
unrolled with the limits of the others, 2 ms for each, without applying them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
from tvm.target import Target

from tuner_server.search.space import DesignSpace, Point

_PRAGMAS = "pragma_"
_KEPT_MODULES = 32


class Twins:
    """The candidates of one task, in groups of siblings.

    Args:
        target: What they are lowered for.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._limits: dict[tuple[DesignSpace, Point], set[int]] = {}
        self._rolled: OrderedDict[tuple[DesignSpace, Point], Any] = OrderedDict()
        self._codes: dict[tuple[DesignSpace, Point], dict[int, int]] = {}

    def add(self, space: DesignSpace, point: Point) -> None:
        """Note a candidate that is built, or was."""
        limit = space.unroll_limit(point)
        if limit is not None:
            self._limits.setdefault((space, space.without_unrolling(point)), set()).add(limit)

    def has(self, space: DesignSpace, point: Point, module: Any = None) -> bool:
        """Whether a candidate becomes the same code as one that was added.

        Args:
            space: Its space.
            point: Its decisions.
            module: The scheduled module, when it is at hand; without it, only what is known of its siblings helps.
        """
        group, limit = (space, space.without_unrolling(point)), space.unroll_limit(point)
        siblings = self._limits.get(group)
        if limit is None or not siblings:
            return False
        if limit in siblings:
            return True
        if group not in self._rolled and module is not None:
            self._rolled[group] = self._lowered(module)
            if len(self._rolled) > _KEPT_MODULES:
                del self._codes[self._rolled.popitem(last=False)[0]]
        if self._rolled.get(group) is None:
            return False
        self._rolled.move_to_end(group)
        code = self._code(group, limit)
        return any(self._code(group, sibling) == code for sibling in siblings)

    def _code(self, group: tuple[DesignSpace, Point], limit: int) -> int:
        codes = self._codes.setdefault(group, {})
        if limit not in codes:
            config = {"tirx.UnrollLoop": {"auto_max_step": limit}}
            with self._target, tvm.transform.PassContext(config=config):
                codes[limit] = tvm_ffi.structural_hash(tirx.transform.UnrollLoop()(self._rolled[group]))
        return codes[limit]

    def _lowered(self, module: Any) -> Any:
        """The module as it is before loops are unrolled, without its own limit; None when it cannot be lowered."""
        try:
            module = _without_pragmas(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module))
            with self._target:
                module = tirx.transform.BindTarget(self._target.with_host("llvm"))(module)
                return tvm.transform.Sequential(_PASSES)(module)
        except Exception:  # the build will say why
            return None


def _without_pragmas(module: Any) -> Any:
    schedule = Schedule(module, debug_mask=0, error_render_level="none")
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        for loop in schedule.get_loops(block):
            for name in list(schedule.get(loop).annotations):
                if str(name).startswith(_PRAGMAS):
                    schedule.unannotate(loop, name)
    return schedule.mod


# Of TVM's default pipeline (tvm.s_tir.pipeline), those before UnrollLoop that change which loops there are.
_PASSES = [
    s_tir.transform.CanonicalizeLoop(),
    s_tir.transform.LowerCrossThreadReduction(),
    s_tir.transform.LowerInitBlock(),
    s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
    s_tir.transform.ConvertBlocksToOpaque(),
    s_tir.transform.LiftThreadBinding(),
    s_tir.transform.ManifestSharedMemoryLocalStage(),
    s_tir.transform.CompactBufferAllocation(),
    s_tir.transform.LowerAutoCopy(),
    s_tir.transform.UnifyThreadBinding(),
    s_tir.transform.LowerMatchBuffer(),
    s_tir.transform.StmtSimplify(),
    s_tir.transform.AnnotateIrregularLoop(),
    s_tir.transform.InjectSoftwarePipeline(),
    s_tir.transform.LowerOpaqueBlock(),
    tirx.transform.FlattenBuffer(),
    tirx.transform.NarrowDataType(32),
    s_tir.transform.LoopPartition(),
    tirx.transform.VectorizeLoop(True),
    s_tir.transform.InjectVirtualThread(),
]
