"""Installed packages: those that a command needs, and optional fused kernels. Imports none of them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_aspo.errors import UserError

INSTALL_FOR_GPUS = "make install-gpu"
"""Compiles Transformer Engine for the installed torch, again if it was compiled for another. The build needs CUDA 13's
nvcc, a C++ compiler and the headers of cuDNN and NCCL."""

HUGGING_FACE = "'transformers>=5.19,<5.20' 'safetensors>=0.8,<0.9' 'hydra-core>=1.3.4,<1.4' 'einops>=0.8,<0.9'"
MEGATRON_BRIDGE = "'megatron-bridge>=0.6.2,<0.7'"
"""The extra `hf` for pip, which cannot resolve it: Megatron-Bridge requires an older transformers."""


def check_installed() -> None:
    """Raise UserError if the package was installed for the loss alone."""
    if sys.version_info < (3, 12):
        raise UserError("the command line needs Python 3.12 or newer; only megatron_aspo.loss runs on older ones")
    if missing := _missing("pydantic", "omegaconf", "rich"):
        raise UserError(
            f"the command line needs {', '.join(missing)}, not installed; pip install 'megatron-aspo[train]', or run "
            "make install in a checkout (megatron_aspo.loss needs torch alone)"
        )


def check_hugging_face() -> None:
    """Raise UserError unless the packages that read Hugging Face models are installed."""
    if missing := _missing("transformers", "safetensors", "hydra", "einops", "megatron.bridge"):
        raise UserError(
            f"model.hf_path needs {', '.join(missing)}, not installed; run make install in a checkout, or "
            f"pip install {HUGGING_FACE} && pip install --no-deps {MEGATRON_BRIDGE}"
        )


@dataclass(frozen=True)
class Accelerators:
    """Packages that provide fused kernels."""

    adam: str
    """Megatron-Core's Adam: Transformer Engine's, NVIDIA apex's or torch's."""
    norm: str
    """RMSNorm of the layers. Megatron-Core has none for apex."""
    problems: tuple[str, ...]
    """Lines that name a fault and its fix."""


def find_accelerators() -> Accelerators:
    """Search the import path."""
    engine_fault, apex_fault = _transformer_engine_fault(), _apex_fault()
    has_engine = not engine_fault and not _missing("transformer_engine")
    has_apex = not apex_fault and not _missing("apex", "amp_C")
    return Accelerators(
        adam="Transformer Engine" if has_engine else "NVIDIA apex" if has_apex else "torch",
        norm="Transformer Engine" if has_engine else "torch",
        problems=tuple(filter(None, (engine_fault, apex_fault))),
    )


def _apex_fault() -> str:
    """PyPI has another project named apex, without the folders of NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    if not folders or (folders[0] / "multi_tensor_apply").is_dir():
        return ""
    return (
        f"the package apex in {folders[0]} is not NVIDIA's: pip uninstall apex; NVIDIA's, which is optional, is built "
        "from github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
    )


def _transformer_engine_fault() -> str:
    """Without the compiled extension `import megatron.core` fails. An extension of another version does not load."""
    if _missing("transformer_engine"):
        return ""
    names = ("transformer_engine", "transformer_engine_cu13", "transformer_engine_cu12", "transformer_engine_torch")
    versions = {name: found.version for name in names for found in metadata.distributions(name=name)}
    if _missing("transformer_engine_torch"):
        return f"Transformer Engine is there without its extension for torch; {INSTALL_FOR_GPUS} builds it"
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"the parts of Transformer Engine are of different versions ({listed}); run {INSTALL_FOR_GPUS}"
    return ""


def _missing(*modules: str) -> list[str]:
    """Return the modules that cannot be found; of those in packages, the package is searched first."""
    return [
        module
        for module in modules
        if any(importlib.util.find_spec(name) is None for name in dict.fromkeys((module.partition(".")[0], module)))
    ]
