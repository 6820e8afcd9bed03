"""Detection of Transformer Engine and apex on import paths; an unrelated package with the same name does no harm."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_aspo.config.installed import find_accelerators

ROOT = Path(__file__).parents[2]

# Megatron-Core would use apex in the layers' spec and in Adam.
BUILD = """
import warnings; warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.config.run import *
config = RunConfig(name="t", model=ModelConfig(hidden_size=32, ffn_hidden_size=64))
import apex; print("imported", apex.__file__)
with distributed(config):
    from megatron_aspo.policy.trainer import Policy
    policy = Policy(config, 128)
    norms = {type(m).__module__ for m in policy.model.modules() if "Norm" in type(m).__name__}
    print(norms)
    print(type(policy.optimizer.chained_optimizers[0].optimizer).__module__
          if hasattr(policy.optimizer, "chained_optimizers") else type(policy.optimizer.optimizer).__module__)
"""

IMPOSTOR = ("apex/__init__.py", "apex/models.py", "apex/lib/__init__.py")
"""Some modules of the package that has the name of NVIDIA's on PyPI."""
APEX = ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/multi_tensor_apply/__init__.py")
TE = ("transformer_engine/__init__.py", "transformer_engine_torch.py")
TE_VERSIONS = {"transformer_engine": "2.20.2", "transformer_engine_torch": "2.20.2"}
MIXED = {**TE_VERSIONS, "transformer_engine_torch": "2.19.0"}


def make(folder: Path, files: Sequence[str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("files", "versions", "adam", "norm", "problem"),
    [
        ((), {}, "torch", "torch", None),
        (IMPOSTOR, {}, "torch", "torch", "apex in .* is not NVIDIA's: pip uninstall apex"),
        (APEX, {}, "torch", "torch", None),
        ((*APEX, "amp_C.py"), {}, "NVIDIA apex", "torch", None),
        (TE[:1], {}, "torch", "torch", "Transformer Engine is there without its extension for torch"),
        (TE, TE_VERSIONS, "Transformer Engine", "Transformer Engine", None),
        (TE, MIXED, "torch", "torch", r"\(transformer_engine 2\.20\.2, transformer_engine_torch 2\.19\.0\)"),
    ],
)
def test_what_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: Sequence[str],
    versions: Mapping[str, str],
    adam: str,
    norm: str,
    problem: str | None,
) -> None:
    make(tmp_path, files)
    for name, version in versions.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_accelerators()
    assert (found.adam, found.norm, len(found.problems)) == (adam, norm, int(problem is not None))
    assert problem is None or re.search(problem, found.problems[0])


@pytest.mark.slow
def test_an_impostor_harms_no_model(tmp_path: Path) -> None:
    make(tmp_path, IMPOSTOR)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{BUILD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported, norms, adam = done.stdout.splitlines()
    assert imported == f"imported {tmp_path}/apex/__init__.py"
    assert norms == "{'megatron_aspo.policy.cpu.layers'}"
    assert adam.startswith("torch.optim")
