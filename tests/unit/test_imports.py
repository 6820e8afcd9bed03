"""Who may import whom: the loss needs torch alone, and Megatron and its globals stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import megatron_aspo

PACKAGE = Path(megatron_aspo.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MEGATRON_ALLOWED = ("policy/", "rollout/megatron.py", "planning/build.py")

BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_needs_torch_alone() -> None:
    """All of the project's other dependencies are away; torch itself does without numpy."""
    blocked = (
        *("megatron", "transformer_engine", "triton", "vllm", "transformers", "numpy", "omegaconf", "yaml", "rich"),
        *("tensorboard", "matplotlib", "psutil", "reasoning_gym"),
    )
    use = """
import torch
from megatron_aspo.loss import PolicyLossConfig, megatron_loss_func, policy_loss, vocab_parallel_logprobs

logits = torch.zeros(4, 8, requires_grad=True)
t = torch.zeros(4)
loss_sum, denominator, _ = megatron_loss_func(
    logits, targets=t.long(), old_logprobs=None, advantages=t + 1, loss_mask=t + 1,
    config=PolicyLossConfig(entropy_quantile=0.8), tp_group=None,
)
loss_sum.backward()
ours = sorted(name for name in sys.modules if name.startswith("megatron_aspo."))
print(loss_sum.item(), denominator.item(), logits.grad[0, 1].item(), *ours)
"""
    loss, denominator, gradient, *ours = run_python(BLOCK.format(blocked=blocked) + use).split()
    assert (float(loss), int(denominator), float(gradient)) == (-4, 4, 0.125)
    assert ours == [
        f"megatron_aspo.{name}"
        for name in (
            *(
                "config",
                "config_data",
                "config_rewards",
                "config_rules",
                "errors",
                "fp8",
                "import_path",
                "loss",
                "loss.collectives",
                "loss.correction",
                "loss.custom",
                "loss.fused_linear",
                "loss.logprobs",
            ),
            *(
                "loss.megatron",
                "loss.metrics",
                "loss.objectives",
                "loss.reduction",
                "loss.responses",
                "loss.softmax",
                "loss.tokens",
            ),
            *("loss.truncation", "loss.validation", "types"),
        )
    ]


def test_the_block_blocks() -> None:
    with pytest.raises(AssertionError, match="No module named 'numpy'"):
        run_python(BLOCK.format(blocked=("numpy",)) + "import megatron_aspo.packing")


@pytest.mark.parametrize(
    "module", ["config", "config_checks", "config_file", "errors", "import_path", "types", "cli", "launch", "run_log"]
)
def test_what_stays_light(module: str) -> None:
    heavy = {"torch", "megatron", "numpy", "omegaconf", "yaml", "rich", "matplotlib", "reasoning_gym"}
    found = run_python(f"import sys, megatron_aspo.{module}; print(*sorted({heavy!r} & set(sys.modules)))")
    assert found == "\n"


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, within functions too, but for those for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import a.b as c\nif TYPE_CHECKING:\n    import numpy\ndef f():\n    from d.e import g, h\n")
    assert sorted(imports(module)) == ["a.b", "d.e.g", "d.e.h"]
    assert len(MODULES) > 25


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_layers(path: Path) -> None:
    name = relative(path)
    names = set(imports(path))
    ours = {n for n in names if within(n, "megatron_aspo")}
    if not name.startswith(MEGATRON_ALLOWED):
        assert not {n for n in names if within(n, "megatron")}
        assert "parallel_state" not in path.read_text()
    if name != "rollout/vllm.py":
        assert not {n for n in names if within(n, "vllm")}
    if name == "loss/objectives.py":
        assert {n.partition(".")[0] for n in names - ours} == {
            "__future__",
            "collections",
            "dataclasses",
            "torch",
        }
        assert {n for n in ours if not within(n, "megatron_aspo.config", "megatron_aspo.errors")} == set()
    if name.startswith("loss/"):
        allowed = ("config", "errors", "import_path", "types", "loss")
        assert {n for n in ours if not within(n, *(f"megatron_aspo.{a}" for a in allowed))} == set()
    if name.startswith(("data/", "policy/", "rollout/", "rewards/")) or name in (
        "packing.py",
        "advantages.py",
    ):
        above = ("train", "eval", "evaluation", "cli", "launch", "journal", "report", "warmup")
        assert not {n for n in ours if within(n, *(f"megatron_aspo.{a}" for a in above))}
    if name.startswith("policy/"):
        assert not {n for n in ours if within(n, "megatron_aspo.rollout", "megatron_aspo.rewards")}
    if name.startswith("config") or name in ("errors.py", "fp8.py", "import_path.py", "types.py"):
        assert not {n for n in names if within(n, "torch", "numpy")}
        # fp8.py names a class of config.py for the type checker alone.
        parts = ("config", "config_checks", "config_data", "config_rewards", "config_rules", "errors", "fp8")
        assert {n for n in ours if not within(n, *(f"megatron_aspo.{part}" for part in parts))} == set()


def foreign_attributes_set(path: Path) -> list[str]:
    """Assignments to, and setattr on, something that was imported from outside the package."""
    tree = ast.parse(path.read_text())
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not within(node.module or "", "megatron_aspo"):
            foreign |= {alias.asname or alias.name for alias in node.names}

    def is_foreign(node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in foreign

    found: list[str] = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            found += [ast.unparse(node)] if is_foreign(node.args[0]) else []
        found += [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and is_foreign(t)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_one_module_patches_others(path: Path) -> None:
    patched = foreign_attributes_set(path)
    if relative(path) == "policy/cpu.py":
        assert "torch.Tensor.cuda" in patched
        assert len(patched) >= 4
    else:
        assert patched == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Megatron's functions are compiled")
def test_a_rank_on_a_cpu_starts_without_the_compiler() -> None:
    """It takes a third of the imports' time. Who asks torch for it afterwards gets it."""
    use = """
import sys, megatron_aspo.train, torch
from megatron.core.fusions.fused_bias_swiglu import swiglu
print(*{"torch._dynamo", "torch._inductor"} & set(sys.modules))
print(torch.compile.__module__, hasattr(swiglu, "__wrapped__"))
"""
    assert run_python(use).split() == ["torch", "False"]
