"""What is found of Transformer Engine and apex, on import paths of real folders; an impostor harms nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FIND = "from megatron_aspo.accelerators import find_accelerators; print(find_accelerators())"

# The spec of the layers, and Adam, are where Megatron-Core would take to apex.
BUILD = """
import warnings; warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from megatron_aspo.distributed import distributed
from megatron_aspo.config import *
config = RunConfig(name="t", model=ModelConfig(hidden_size=32, ffn_hidden_size=64))
import apex; print("imported", apex.__file__)
with distributed(config):
    from megatron_aspo.policy.trainer import Policy
    policy = Policy(config, 128)
    norms = {type(m).__module__ for m in policy.model.modules() if "Norm" in type(m).__name__}
    print(norms, policy.model.config.gradient_accumulation_fusion)
    print(type(policy.optimizer.chained_optimizers[0].optimizer).__module__
          if hasattr(policy.optimizer, "chained_optimizers") else type(policy.optimizer.optimizer).__module__)
"""


def run(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def impostor(tmp_path: Path) -> Path:
    """A package named as PyPI's, with its metadata and some of its modules."""
    make(tmp_path, "apex/__init__.py", "apex/models.py", "apex/lib/__init__.py")
    info = tmp_path / "apex-0.9.10.dev0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Toolkit for the Pyramid web framework\n"
    )
    return tmp_path


def test_nothing_is_there(tmp_path: Path) -> None:
    assert run(tmp_path, FIND) == "Adam: torch\nRMSNorm: torch\nfused weight gradients: none\n"


def test_an_impostor_is_named(impostor: Path) -> None:
    *found, problem = run(impostor, FIND).splitlines()
    assert found == ["Adam: torch", "RMSNorm: torch", "fused weight gradients: none"]
    assert problem.startswith("apex 0.9.10.dev0 (Toolkit for the Pyramid web framework) at ")
    assert "is not NVIDIA's: pip uninstall apex" in problem


@pytest.mark.slow
def test_an_impostor_harms_no_model(impostor: Path) -> None:
    imported, norms, adam = run(impostor, BUILD).splitlines()
    assert imported == f"imported {impostor}/apex/__init__.py"
    assert norms == "{'megatron_aspo.policy.cpu'} False"
    assert adam.startswith("torch.optim")


@pytest.mark.parametrize(
    ("extensions", "adam", "wgrad"),
    [
        ((), "torch", "none"),
        (("amp_C.py",), "NVIDIA apex", "none"),
        (("amp_C.py", "fused_weight_gradient_mlp_cuda.py"), "NVIDIA apex", "NVIDIA apex"),
    ],
)
def test_nvidia_apex_counts_by_its_extensions(
    tmp_path: Path, extensions: tuple[str, ...], adam: str, wgrad: str
) -> None:
    packages = ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/multi_tensor_apply/__init__.py")
    make(tmp_path, *packages, *extensions)
    assert run(tmp_path, FIND) == f"Adam: {adam}\nRMSNorm: torch\nfused weight gradients: {wgrad}\n"


def test_transformer_engine_without_its_extension(tmp_path: Path) -> None:
    make(tmp_path, "transformer_engine/__init__.py")
    assert "Transformer Engine is there without its extension for torch; install" in run(tmp_path, FIND)


@pytest.mark.parametrize(("version", "adam"), [("2.20.2", "Transformer Engine"), ("2.19.0", "torch")])
def test_the_parts_of_transformer_engine_have_one_version(tmp_path: Path, version: str, adam: str) -> None:
    make(tmp_path, "transformer_engine/__init__.py", "transformer_engine_torch.py")
    for name, of in (("transformer_engine", "2.20.2"), ("transformer_engine_torch", version)):
        info = tmp_path / f"{name}-{of}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {of}\n")
    found = run(tmp_path, FIND)
    assert found.startswith(f"Adam: {adam}\nRMSNorm: {adam}\n")
    assert ("different versions (transformer_engine 2.20.2, transformer_engine_torch 2.19.0)" in found) == (
        adam == "torch"
    )
