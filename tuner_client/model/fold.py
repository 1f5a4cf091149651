"""Fold the constant arithmetic that batch normalisation leaves behind, with numpy.

TVM's own FoldConstant compiles a function for every shape it meets: 95 % of the preparation of ResNet-50. What is
folded here it finds done; what is not, it still does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.ir import IRModule

_BINARY = {"relax.add": "add", "relax.subtract": "subtract", "relax.multiply": "multiply", "relax.divide": "divide"}
_MOST_TO_TRANSPOSE = 1 << 22  # elements; beyond, TVM's compiled loops are faster than numpy's
_DTYPES = frozenset({"float16", "float32", "float64"})


def fold_constants(mod: IRModule) -> IRModule:
    """Replace arithmetic and reshaping of floating-point constants in ``main`` by their results.

    Args:
        mod: A Relax module before legalisation.
    """
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class _Folder(PyExprMutator):
        def __init__(self) -> None:
            super().__init__(mod)
            self.known: dict[int, tuple[Any, Any]] = {}  # by address, which the kept variable keeps valid

        def visit_var_binding_(self, binding: Any) -> None:
            if isinstance(binding.var, relax.DataflowVar):
                folded = _evaluate(binding.value, self.constant)
                if folded is not None:
                    # the variable goes away; a variable that leaves the block must stay bound
                    self.known[binding.var.__chandle__()] = (binding.var, relax.const(folded))
                    return
            super().visit_var_binding_(binding)

        def visit_dataflow_var_(self, op: Any) -> Any:
            known = self.known.get(op.__chandle__())
            return known[1] if known else super().visit_dataflow_var_(op)

        def constant(self, expression: Any) -> Any:
            known = self.known.get(expression.__chandle__())
            expression = known[1] if known else expression
            return expression if isinstance(expression, ir.GenericConst) else None

    main = mod["main"]
    folder = _Folder()
    result = ir.IRModule(dict(mod.functions.items()), attrs=mod.attrs, global_infos=mod.global_infos)
    result.update_func(mod.get_global_var("main"), folder.visit_expr(main))
    return result


def _evaluate(call: Any, constant: Callable[[Any], Any]) -> Any:
    """The call's value as an array, or None when it is not a foldable call of constants."""
    import numpy as np
    from tvm import ir, relax

    if not isinstance(call, ir.Call) or not isinstance(call.op, ir.Op):
        return None
    name = str(call.op.name)
    arrays = []
    for argument in call.args:
        if isinstance(argument, relax.ShapeExpr):
            continue
        found = constant(argument)
        if found is None or str(found.value.dtype) not in _DTYPES:
            return None
        arrays.append(found)
    if name in _BINARY and len(arrays) == 2:
        left, right = (found.value.numpy() for found in arrays)
        return getattr(np, _BINARY[name])(left, right)
    if len(arrays) != 1:
        return None
    shape = [int(extent) for extent in call.ty.shape] if _static(call.ty) else None
    if name == "relax.sqrt":
        return np.sqrt(arrays[0].value.numpy())
    if name in ("relax.expand_dims", "relax.reshape") and shape is not None:
        return arrays[0].value.numpy().reshape(shape)
    if name == "relax.broadcast_to" and shape is not None:
        return np.ascontiguousarray(np.broadcast_to(arrays[0].value.numpy(), shape))
    if name == "relax.permute_dims" and shape is not None and math.prod(shape) <= _MOST_TO_TRANSPOSE:
        axes = call.attrs.axes
        return np.ascontiguousarray(
            np.transpose(arrays[0].value.numpy(), None if axes is None else [int(axis) for axis in axes])
        )
    return None


def _static(kind: Any) -> bool:
    from tvm import tirx

    shape = getattr(kind, "shape", None)
    return shape is not None and all(isinstance(extent, int | tirx.IntImm) for extent in shape)
