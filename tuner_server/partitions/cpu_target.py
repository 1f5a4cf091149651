"""The TVM target of this host's processor. Imports TVM: for worker processes only."""

from __future__ import annotations

import json
from pathlib import Path

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.model import canonical_json


def cpu_target(cores: int) -> str:
    """Canonical JSON of the llvm target for a number of this host's cores.

    ``mcpu`` names a processor type with all its instruction sets; those that a hypervisor hides are taken away again.
    """
    load_tvm()
    from tvm.target import Target, codegen

    fields: dict[str, object] = {"kind": "llvm", "num-cores": cores}
    processor = codegen.llvm_get_system_cpu()
    if processor and processor != "generic":
        fields["mcpu"] = processor
        named = codegen.llvm_get_cpu_features(Target(fields))
        hidden = hidden_features([str(feature) for feature in named], kernel_flags())
        if hidden:
            fields["mattr"] = [f"-{feature}" for feature in hidden]
    return canonical_json(json.loads(str(Target(fields))))


def kernel_flags() -> frozenset[str]:
    """Instruction sets that the kernel reports, as in /proc/cpuinfo; empty where it reports none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


def hidden_features(named: list[str], flags: frozenset[str]) -> list[str]:
    """Vector instruction sets of LLVM's processor type that the kernel does not report.

    Args:
        named: LLVM's names, e.g. ``avx512bf16``.
        flags: The kernel's names, e.g. ``avx512_bf16``; empty: nothing is known, so nothing is hidden.
    """
    if not flags:
        return []
    plain = {flag.replace("_", "") for flag in flags}
    vector = ("avx", "fma", "f16c", "vaes", "vpclmulqdq", "gfni")
    return sorted(
        feature
        for feature in named
        if feature.startswith(vector) and feature.replace("-", "").replace("_", "") not in plain
    )
