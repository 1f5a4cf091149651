"""Rewrites of generated CUDA source: what TVM writes wrongly, and what NVRTC compiles in less time in another form.

TVM writes eight elements, or sixteen, as the arguments of a vector of four (``make_uint4`` of eight halves where it
gathers them, ``make_longlong4`` of eight indices, ``make_int4`` of sixteen bytes). It means their bytes one after the
other, which is what its own accesses to elements of such a vector read; here these functions are defined.

The other rewrites keep the operations and their order.

TVM keeps a thread's accumulators in an array. Where it has unrolled the loops, an element is a variable, but the
optimiser sees thousands of uses of one array until it has split it, and its ``instcombine`` visits them all for each
(the time is quadratic). Likewise each statement reads its operands from shared memory again, and value numbering looks
through all statements before it for a store. Both are written down here as what they are: variables.

What takes NVRTC's time can be seen with the options ``-Xnvvm=-Xopt -Xnvvm=--time-passes``.
"""

from __future__ import annotations

import re
from collections import Counter

WORTH_REWRITING = 200
"""Statements of a function below which NVRTC takes as long either way, and gets what TVM wrote."""
_FUNCTION = re.compile(r'^extern "C" __global__ [^;{]*\{\n.*?^\}$', re.MULTILINE | re.DOTALL)
_LOCAL_ARRAY = re.compile(r"^( *)alignas\(\d+\) (\w+) (\w+)\[(\d+)\];$", re.MULTILINE)
_SHARED_ARRAY = re.compile(r"^ *__shared__ alignas\(\d+\) \w+ (\w+)\[\d+\];$", re.MULTILINE)
_ASSIGNMENT = re.compile(r"^\s*(?:(\w+)(?:\[[^\[\]]*\])?|\*\(\w+\*\)\((\w+) \+ [^;=]*\)) = (.*);$")
_IMPURE = re.compile(r"asm|sync|shfl|atomic|volatile|mma|ptx|tvm_|[^<>=!]=[^=]")
_WORD = re.compile(r"\w+")
_PACKED = re.compile(r"\bmake_(longlong4|u?int[24])\(")
_NAME = "tuner_read_"


def rewritten(source: str) -> str:
    """The source with elements of local arrays, and what is read from shared memory twice, as variables.

    Functions that are small, or index a local array with anything but a number, stay as they are: there the optimiser's
    decision to unroll a loop depends on what is in it. Vectors of more elements than their type has can be made.

    Args:
        source: CUDA C++ as TVM generates it.
    """
    if _NAME in source:
        return source
    return _FUNCTION.sub(lambda found: _rewritten_function(found[0]), _with_packing(source))


def _with_packing(source: str) -> str:
    """The source with the functions that make a vector of eight or sixteen smaller elements, if it makes any vector."""
    kinds = sorted(set(_PACKED.findall(source)))
    start = source.find('extern "C"')
    if not kinds or start < 0:
        return source
    made = "".join(_packing(kind, elements) for kind in kinds for elements in (8, 16))
    return f"{source[:start]}{made}{source[start:]}"


def _packing(kind: str, elements: int) -> str:
    """A function of ``make_``'s name with so many arguments of one type; it fits only where their sizes add up."""
    parameters = ", ".join(f"T v{number}" for number in range(elements))
    values = ", ".join(f"v{number}" for number in range(elements))
    return (
        f"template <typename T> static __device__ inline {kind} make_{kind}({parameters}) {{\n"
        f'  static_assert(sizeof(T) * {elements} == sizeof({kind}), "elements of another size");\n'
        f"  const T values[{elements}] = {{{values}}};\n"
        f"  {kind} packed;\n"
        f"  memcpy(&packed, values, sizeof(packed));\n"
        f"  return packed;\n"
        f"}}\n"
    )


def _rewritten_function(function: str) -> str:
    if function.count(";") < WORTH_REWRITING:
        return function
    scalars = _with_scalars(function)
    return function if scalars is None else _with_named_reads(scalars)


def _with_scalars(function: str) -> str | None:
    """Local arrays as variables; None when there is none, or one cannot be."""
    arrays = list(_LOCAL_ARRAY.finditer(function))
    names = [array[3] for array in arrays]
    if not arrays or len(set(names)) < len(names):
        return None
    pattern = "|".join(map(re.escape, names))
    uses = Counter(re.findall(rf"\b({pattern})\b", function))
    elements = Counter(re.findall(rf"\b({pattern})\[\d+\]", function))
    if any(uses[name] != elements[name] for name in names):  # a declaration looks like an element
        return None

    def declared(array: re.Match[str]) -> str:
        indent, kind, name, count = array.groups()
        return f"{indent}{kind} " + ", ".join(f"{name}_{index}" for index in range(int(count))) + ";"

    return re.sub(rf"\b({pattern})\[(\d+)\]", r"\1_\2", _LOCAL_ARRAY.sub(declared, function))


def _with_named_reads(function: str) -> str:
    """What straight-line code reads from shared memory more than once, read once."""
    shared = _SHARED_ARRAY.findall(function)
    if not shared:
        return function
    read = re.compile(rf"\b(?:{'|'.join(map(re.escape, shared))})\[[^\[\]]*\]")
    lines: list[str] = []
    straight: list[re.Match[str]] = []
    number = 0
    for line in function.split("\n"):
        assignment = _ASSIGNMENT.match(line)
        if assignment is not None and not _IMPURE.search(assignment[3]):
            straight.append(assignment)
            continue
        number = _name_reads(straight, read, lines, number)
        straight = []
        lines.append(line)
    return "\n".join(lines)


def _name_reads(straight: list[re.Match[str]], read: re.Pattern[str], lines: list[str], number: int) -> int:
    """Append some assignments without a branch or a barrier between them; returns the next free number."""
    times = Counter(found[0] for assignment in straight for found in read.finditer(assignment[3]))
    names: dict[str, str] = {}
    sources = {word for text, count in times.items() if count > 1 for word in _WORD.findall(text)}
    for assignment in straight:
        pieces: list[str] = []
        end = 0
        value = assignment[3]
        for found in read.finditer(value):
            if times[found[0]] < 2:
                continue
            if found[0] not in names:
                names[found[0]] = f"{_NAME}{number}"
                lines.append(f"  const auto {_NAME}{number} = {found[0]};")
                number += 1
            pieces += (value[end : found.start()], names[found[0]])
            end = found.end()
        left = assignment.string[: assignment.start(3)]
        lines.append(f"{left}{''.join(pieces)}{value[end:]};")
        written = assignment[1] or assignment[2]
        if written in sources:
            names = {text: name for text, name in names.items() if written not in _WORD.findall(text)}
    return number
