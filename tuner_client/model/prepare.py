"""Prepare an imported model once: fuse it, extract its tasks, and take its weights out for the wire."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner_client.model.fold import fold_constants
from tuner_client.model.layout import NCHW, NHWC, choose_layout, convert_layout
from tuner_client.model.load import one_line
from tuner_core.compiler.describe import worth_trials
from tuner_core.compiler.fallback import has_device_code
from tuner_core.compiler.lift import lift_constants
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import normalise, workload_from_module
from tuner_core.errors import ModelError, UsageError
from tuner_core.model import Workload

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.runtime import Tensor
    from tvm.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractedTask:
    """One operator of a model.

    Attributes:
        name: Name of (the first of) its functions in the prepared module.
        workload: The operator.
        weight: How often the model calls it.
        tunable: Worth trials; the others take the fallback schedule.
    """

    name: str
    workload: Workload
    weight: int
    tunable: bool


@dataclass(frozen=True)
class Prepared:
    """A prepared model.

    Attributes:
        module: With its weights as constants: what ``--output`` and ``build`` apply schedules to.
        lifted_json: JSON of the same module with its weights as parameters of ``main``: what is sent. Scalars and
            small integer constants are still in it.
        weights: The constants, in the order of those parameters.
        tasks: The operators, in the order of their first calls.
        layout: Of its 2-D convolutions, see :func:`tuner_client.model.layout.choose_layout`; empty without any.
    """

    module: IRModule
    lifted_json: str
    weights: tuple[Tensor, ...]
    tasks: tuple[ExtractedTask, ...]
    layout: str = ""


def prepare(module: IRModule, target_json: str, layout: str = "auto") -> Prepared:
    """Lower an imported model to calls of fused TIR functions and list these as tasks.

    Args:
        module: From ``load_model``.
        target_json: Target to prepare for; the same target must be used for tuning and for building.
        layout: ``auto``, ``NCHW`` or ``NHWC``, for 2-D convolutions; the same for tuning and for building.

    Raises:
        ModelError: TVM cannot lower the model, or not in the layout asked for, or shapes are still open after
            lowering.
        UsageError: The target is not one, or the layout.
    """
    load_tvm(intrinsics=True)
    target = parse_target(target_json)
    prepared, chosen = _lower(module, target, layout)
    tasks = _tasks(prepared, target)
    import tvm

    lifted, weights = lift_constants(prepared)
    return Prepared(prepared, tvm.ir.save_json(lifted), tuple(weights), tuple(tasks), chosen)


def parse_target(target_json: str) -> Target:
    """A target from its JSON.

    Raises:
        UsageError: Not JSON of a target.
    """
    load_tvm()
    from tvm.target import Target

    try:
        value = json.loads(target_json)
        if not isinstance(value, dict):
            raise ValueError("expected an object with a kind")
        return Target(value)
    except Exception as error:  # TVM's own errors for unknown kinds and attributes
        raise UsageError(f"not a target: {target_json[:120]} ({one_line(error)})") from None


def _lower(module: IRModule, target: Target, layout: str) -> tuple[IRModule, str]:
    """The prepared module, and the layout that its convolutions have now."""
    import tvm
    from tvm import relax
    from tvm.ir.transform import PassContext
    from tvm.s_tir import meta_schedule as ms

    # a database of the caller's scope would replace functions before they become tasks
    outer = ms.database.Database.current()
    shield: Any = ms.database.MemoryDatabase() if outer is not None else contextlib.nullcontext()
    passes = tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            relax.transform.DecomposeOpsForInference(),
            relax.transform.CanonicalizeBindings(),
        ]
    )
    try:
        with target, shield, PassContext(opt_level=3):
            decomposed = passes(module)
            chosen = choose_layout(decomposed, target, layout)
            if chosen == NHWC:
                decomposed, chosen = _converted(decomposed, required=layout == NHWC)
            return relax.get_pipeline("zero")(fold_constants(decomposed)), chosen
    except (ModelError, UsageError):
        raise
    except Exception as error:  # TVM's errors have no common base
        raise ModelError(f"TVM cannot lower this model for {target.kind.name}: {one_line(error)}") from error


def _converted(module: IRModule, *, required: bool) -> tuple[IRModule, str]:
    """The module with NHWC convolutions; unless that is required, the module itself where TVM cannot convert it."""
    try:
        return convert_layout(module), NHWC
    except Exception as error:  # TVM's errors have no common base
        reason = one_line(error)
        if required:
            raise ModelError(f"TVM cannot convert this model to NHWC: {reason}; try --layout {NCHW}") from error
        log.warning("the model keeps its layout, in which tensor cores are fed less well: %s", reason)
        return module, NCHW


def _tasks(prepared: IRModule, target: Target) -> list[ExtractedTask]:
    from tvm import relax
    from tvm.s_tir import meta_schedule as ms

    main = prepared["main"]
    order: dict[str, int] = {}

    def note(node: Any) -> None:
        if isinstance(node, relax.Call) and node.args and hasattr(node.args[0], "name_hint"):
            order.setdefault(node.args[0].name_hint, len(order))

    relax.analysis.post_order_visit(main, note)
    tasks = []
    for task in ms.relax_integration.extract_tasks(prepared, target):
        module = normalise(task.dispatched[0])
        if _has_open_shapes(module["main"]) and has_device_code(module["main"]):
            continue  # TVM's own scan for GPUs, with its shapes as parameters: there is nothing to tune
        workload = workload_from_module(module)
        if any(0 in shape for _, _, shape in workload.args_info):
            raise ModelError(
                f"operator {task.task_name} has no fixed shape: give the inputs' shapes with --input-shape"
            )
        tasks.append(ExtractedTask(str(task.task_name), workload, int(task.weight), worth_trials(module)))
    tasks.sort(key=lambda task: (order.get(task.name, len(order)), task.name))
    return tasks


def _has_open_shapes(function: Any) -> bool:
    from tvm import tirx

    return any(
        not isinstance(extent, int | tirx.IntImm)
        for parameter in function.params
        for extent in getattr(parameter, "shape", ())
    )
