"""Bring a model's convolutions into the layout in which they are tuned and built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuner_client.model.fold import fold_constants
from tuner_client.request import check_layout

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.target import Target

NCHW, NHWC = "NCHW", "NHWC"
_KERNEL = "OHWI"
_RANK = 4
_ARITHMETIC = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum"))
_FIRST_TENSOR_CORES = 70  # compute capability, times ten


def choose_layout(module: IRModule, target: Target, asked: str) -> str:
    """The layout of a model's 2-D convolutions on a target.

    MetaSchedule maps an fp16 convolution of either layout to a matrix product on tensor cores, which then wait for
    memory. With the channels innermost, the reduced dimension is contiguous, and candidates read 16 bytes at a time
    (14 times as many of them as in NCHW, which gathers: benchmarks/NOTES.md). Everything else keeps the layout that
    its file has: fp32 has no tensor-core schedule, and no conversion costs nothing.

    Args:
        module: An imported model, not yet legalised.
        target: What it is prepared for.
        asked: ``auto``, ``NCHW`` (as the model has it) or ``NHWC``.

    Returns:
        ``NHWC`` when the model is to be converted; ``NCHW`` when its convolutions stay as they are; empty when it
        has no 2-D convolution.

    Raises:
        UsageError: No such layout.
    """
    check_layout(asked)
    dtypes = _convolutions(module)
    if not dtypes:
        return ""
    if asked != "auto":
        return asked
    return NHWC if _has_tensor_cores(target) and "float16" in dtypes else NCHW


def convert_layout(module: IRModule) -> IRModule:
    """Convert the 2-D convolutions of ``main`` to NHWC, and what lies between them.

    Args:
        module: After DecomposeOpsForInference.

    Raises:
        Exception: Whatever TVM's pass trips over; its errors have no common base.
    """
    import tvm
    from tvm import relax

    passes = [
        relax.transform.ConvertLayout({"relax.nn.conv2d": [NHWC, _KERNEL]}),
        relax.transform.CanonicalizeBindings(),
    ]
    return tvm.transform.Sequential(passes)(_simplified(fold_constants(module)))


def _simplified(mod: IRModule) -> IRModule:
    """Write more plainly what stops TVM's conversion.

    That is an ONNX Sum (broadcast, stack, sum), a dropout, and arithmetic with constants of a lower rank.
    """
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class _Simplifier(PyExprMutator):
        def __init__(self) -> None:
            super().__init__(mod)
            self.calls: dict[int, Any] = {}  # by address of the variable, which the module keeps valid

        def visit_var_binding_(self, binding: Any) -> None:
            value = binding.value
            if isinstance(value, ir.Call):
                self.calls[binding.var.__chandle__()] = value
            super().visit_var_binding_(binding)

        def visit_call_(self, call: Any) -> Any:
            if _is(call, "relax.broadcast_to") and _same_shape(call.ty, call.args[0].ty):
                return self.visit_expr(call.args[0])
            terms = self._terms(call)
            if not terms:
                return super().visit_call_(_with_constants_of_full_rank(call))
            total = self.visit_expr(terms[0])
            for term in terms[1:-1]:
                total = self.builder_.emit(relax.op.add(total, self.visit_expr(term)))
            return relax.op.add(total, self.visit_expr(terms[-1])) if len(terms) > 1 else total

        def visit_tuple_getitem_(self, item: Any) -> Any:
            dropout = self._made_by(item.tuple_value, "relax.nn.dropout")
            if dropout is not None and item.index == 0:
                return self.visit_expr(dropout.args[0])
            return super().visit_tuple_getitem_(item)

        def _terms(self, call: Any) -> list[Any]:
            """The summands of a sum over what a stack made of equal shapes."""
            if (
                not _is(call, "relax.sum")
                or call.attrs.keepdims
                or [int(axis) for axis in call.attrs.axis or ()] != [0]
            ):
                return []
            stack = self._made_by(call.args[0], "relax.stack")
            if stack is None or int(stack.attrs.axis or 0) != 0 or not isinstance(stack.args[0], ir.Tuple):
                return []
            return list(stack.args[0].fields)

        def _made_by(self, expression: Any, name: str) -> Any:
            call = self.calls.get(expression.__chandle__())
            return call if call is not None and _is(call, name) else None

    simplifier = _Simplifier()
    result = ir.IRModule(dict(mod.functions.items()), attrs=mod.attrs, global_infos=mod.global_infos)
    result.update_func(mod.get_global_var("main"), simplifier.visit_expr(mod["main"]))
    # an alias of a variable would end the conversion
    return relax.transform.DeadCodeElimination()(relax.transform.CanonicalizeBindings()(result))


def _with_constants_of_full_rank(call: Any) -> Any:
    from tvm import ir, relax

    if not isinstance(call.op, ir.Op) or str(call.op.name) not in _ARITHMETIC or call.ty.ndim != _RANK:
        return call
    arguments = list(call.args)
    for position, argument in enumerate(arguments):
        if isinstance(argument, ir.GenericConst) and 0 < argument.ty.ndim < _RANK:
            value = argument.value.numpy()
            arguments[position] = relax.const(value.reshape((1,) * (_RANK - value.ndim) + value.shape))
    return ir.Call(call.op, arguments, call.attrs, ty_args=call.ty_args)


def _same_shape(first: Any, second: Any) -> bool:
    import tvm_ffi

    shapes = getattr(first, "shape", None), getattr(second, "shape", None)
    return None not in shapes and bool(tvm_ffi.structural_equal(*shapes))


def _is(call: Any, name: str) -> bool:
    from tvm import ir

    return isinstance(call.op, ir.Op) and str(call.op.name) == name


def _convolutions(mod: IRModule) -> set[str]:
    """Types of the inputs of the model's 2-D convolutions in NCHW."""
    from tvm import ir, relax

    found: set[str] = set()

    def note(node: Any) -> None:
        if isinstance(node, ir.Call) and _is(node, "relax.nn.conv2d") and str(node.attrs.data_layout) == NCHW:
            found.add(str(node.args[0].ty.dtype))

    for function in mod.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, note)
    return found


def _has_tensor_cores(target: Target) -> bool:
    arch = str(target.attrs.get("arch", "")) if target.kind.name == "cuda" else ""
    digits = arch.removeprefix("sm_").rstrip("af")
    return digits.isdigit() and int(digits) >= _FIRST_TENSOR_CORES
