"""Take the weights out of a prepared model, so that it can be sent without them.

Lifting after preparation, not before, leaves every TIR function as it is: records still match, outputs are identical.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import ModelError

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.runtime import Tensor

SMALL_INTEGERS = 64  # elements: axes, shapes, paddings and look-up indices are structure rather than weights


def lift_constants(prepared: IRModule) -> tuple[IRModule, list[Tensor]]:
    """Turn the constants of ``main`` into extra parameters behind its inputs.

    Scalars (one element) and integer constants of at most 64 elements stay in the module: they are structure, and are
    sent with it.

    Args:
        prepared: A prepared module whose ``main`` calls TIR functions.

    Returns:
        The lifted module, and the constants in the order of the new parameters.

    Raises:
        ModelError: The module has no ``main``, or a constant sits in a function other than ``main``.
    """
    load_tvm()
    import tvm
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    names = [var.name_hint for var, function in prepared.functions.items() if isinstance(function, relax.Function)]
    if names != ["main"]:
        raise ModelError(f"a prepared model has exactly one function main, this one has {', '.join(names) or 'none'}")

    @mutator
    class _Lifter(PyExprMutator):
        def __init__(self) -> None:
            super().__init__(prepared)
            self.variables: list[Any] = []
            self.constants: list[Any] = []

        def visit_generic_const_(self, op: Any) -> Any:
            if not isinstance(op.value, tvm.runtime.Tensor) or _stays(op.value):
                return op
            for variable, constant in zip(self.variables, self.constants, strict=True):
                if constant.same_as(op.value):
                    return variable
            variable = relax.Var(f"weight_{len(self.variables)}", op.ty)
            self.variables.append(variable)
            self.constants.append(op.value)
            return variable

    main = prepared["main"]
    lifter = _Lifter()
    body = lifter.visit_expr(main.body)
    params = [*main.params, *lifter.variables]
    lifted = relax.Function(params, body, main.ret_ty, main.is_pure, attrs=main.attrs)
    if "num_input" not in (main.attrs or {}):
        lifted = lifted.with_attr("num_input", len(main.params))
    module = ir.IRModule(dict(prepared.functions.items()), attrs=prepared.attrs, global_infos=prepared.global_infos)
    module.update_func(prepared.get_global_var("main"), lifted)
    return module, lifter.constants


def _stays(tensor: Any) -> bool:
    elements = 1
    for extent in tensor.shape:
        elements *= int(extent)
    if elements <= 1:
        return True
    return elements <= SMALL_INTEGERS and str(tensor.dtype).startswith(("int", "uint", "bool"))
