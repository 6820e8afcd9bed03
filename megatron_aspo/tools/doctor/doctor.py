"""`megatron-aspo doctor`: faults of this machine and of its installed packages, with fixes.

A problem keeps runs from working (exit code 1); a warning may. Absent optional parts are fine.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import requires

from packaging.requirements import Requirement

from megatron_aspo.config import installed as packages
from megatron_aspo.tools.doctor import hardware
from megatron_aspo.tools.doctor.probes import Finding, TorchFacts, import_errors, installed, torch_facts

EXTRAS = ("train", "hf", "cpu", "gpu")
"""Extras whose packages are checked. Those of `train` are required."""


def examine(imports: bool = True) -> Iterator[Finding]:
    """All findings, in the order in which they build upon each other. `imports`: test whether packages import."""
    broken = import_errors() if imports else {}
    has_torch = installed("torch") is not None and "torch" not in broken
    facts = torch_facts() if has_torch else TorchFacts(error="there is no torch that can be imported")
    yield Finding("python", platform.python_version())
    yield from check_packages(broken)
    yield from check_kernels(facts)
    yield from hardware.check_torch(facts)
    yield from hardware.check_gpus(facts)
    yield from hardware.check_fp8(facts)
    yield from hardware.check_limits()


def problems() -> list[str]:
    """One line for each finding that keeps runs from working on this node.

    Only torch is imported: a run's ranks import the other packages anyway, and many nodes at a cold file system may
    need longer for it than they wait for each other.
    """
    return [f"{finding.what}: {finding.found}" for finding in examine(imports=False) if finding.status == "problem"]


def main() -> int:
    """Print all findings. Returns 1 if there is a problem among them, 0 otherwise."""
    healthy = True
    print("megatron-aspo: importing every package, each in a process of its own: up to a minute", file=sys.stderr)
    for finding in examine():
        healthy = healthy and finding.status != "problem"
        fix = f" -> {finding.fix}" if finding.fix else ""
        print(f"{finding.status:8} {finding.what}: {finding.found}{fix}", flush=True)
    return 0 if healthy else 1


def check_packages(broken: Mapping[str, str]) -> Iterator[Finding]:
    """Compare installed versions with those that the extras require. `broken`: package -> error of its import."""
    if installed("megatron-aspo") is None:
        found = "not installed, so installed versions cannot be compared with its requirements"
        yield Finding("megatron-aspo", found, "warning", "pip install --no-deps -e . in its folder")
    else:
        lines = [Requirement(line) for line in requires("megatron-aspo") or []]
        compared = {"megatron-aspo"}
        for extra in EXTRAS:
            for package in lines:
                is_listed = package.marker is not None and package.marker.evaluate({"extra": extra})
                if is_listed and package.name not in compared:
                    compared.add(package.name)
                    yield from _compare(package, is_needed=extra == "train")
    for name, error in broken.items():
        # Megatron-Core imports Transformer Engine wherever it is installed, and does without the other two.
        status = "warning" if name in ("apex", "flash-attn") or name.startswith("vllm") else "problem"
        found = f"{installed(name)} cannot be imported: {error}"
        yield Finding(name, found, status, "install it again, for this torch; uninstall it if it is not needed")


def _compare(package: Requirement, is_needed: bool) -> Iterator[Finding]:
    found, fix = installed(package.name), f"pip install '{package.name}{package.specifier}'"
    if found is None:
        if is_needed:
            yield Finding(package.name, "not installed", "problem", fix)
    elif package.specifier.contains(found, prereleases=True):
        yield Finding(package.name, found)
    else:
        yield Finding(package.name, found, "warning", f"tested with {package.specifier} only: {fix}")


def check_kernels(facts: TorchFacts) -> Iterator[Finding]:
    """The packages with fused kernels: Transformer Engine and NVIDIA apex."""
    found = packages.find_accelerators()
    yield Finding("fused kernels", f"Adam: {found.adam}, RMSNorm: {found.norm}")
    for problem in found.problems:
        yield Finding("fused kernels", problem, "problem", "see docs/quick-start.md")
    engine = installed("transformer-engine")
    if engine is None and facts.capabilities:
        found = "not installed, and a model on a GPU needs its layers"
        yield Finding("transformer-engine", found, "warning", packages.INSTALL_FOR_GPUS)
    elif engine is not None and not facts.capabilities and not facts.error:
        fix = "pip uninstall transformer-engine: Megatron uses its norms and optimizer on a CPU too"
        yield Finding("transformer-engine", f"{engine}, but no GPU", "problem", fix)
