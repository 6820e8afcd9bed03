"""Check 1: versions, extensions and the toolkit."""

from __future__ import annotations

import importlib
import shutil

import torch

from megatron_aspo.errors import RunError
from megatron_aspo.tools.doctor.doctor import examine
from megatron_aspo.tools.doctor.probes import ask
from megatron_aspo.tools.gpu_check.records import ANY, Lab, Numbers, check


@check(
    "1 installation",
    30,
    {"error of a layer": (0, 1e-2), "driver": (580, 1e4), "cuDNN": (92000, 1e6), "nvcc": ANY},
)
def installation(lab: Lab) -> Numbers:
    """The doctor's findings, the extensions of vLLM and FlashInfer, and one layer of Transformer Engine."""
    findings = [finding for finding in examine(imports=False) if finding.status == "problem"]
    if findings:
        raise RunError("; ".join(f"{finding.what}: {finding.found} -> {finding.fix}" for finding in findings))
    for name in ("vllm._C_stable_libtorch", "flashinfer"):
        importlib.import_module(name)
    engine = importlib.import_module("transformer_engine.pytorch")
    layer = engine.Linear(256, 512, bias=False, params_dtype=torch.bfloat16, device=lab.device)
    states = torch.randn(64, 256, device=lab.device).bfloat16()
    exact = states.double() @ layer.weight.double().t()
    driver, _ = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "error of a layer": float((layer(states).double() - exact).abs().max() / exact.abs().max()),
        "driver": float(driver.partition(".")[0]),
        "cuDNN": torch.backends.cudnn.version() or 0,
        "nvcc": float(shutil.which("nvcc") is not None),
    }
