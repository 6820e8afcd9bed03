"""Structure of the package: allowed imports between its parts, size of modules, and dependencies of each part."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import megatron_aspo

PACKAGE = Path(megatron_aspo.__file__).parent
TESTS = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ROOMS = (
    *("__version__", "errors", "batch", "config", "ranks", "journal", "rewards", "data"),
    *("loss", "policy", "rollout", "train", "tools", "commands", "cli", "__main__"),
)
"""In order: a part may import from itself and from earlier parts."""

ONLY_IN = {  # package -> where it may be imported
    "megatron": ("policy", "rollout.megatron", "tools.rehearsal", "tools.gpu_check"),
    "vllm": ("rollout.vllm",),
    "torch": ("ranks", "journal", "data", "rewards", "loss", "policy", "rollout", "train", "tools", "commands"),
    "numpy": ("batch", "data", "rewards", "policy", "rollout", "tools", "commands"),
}

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


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether at import time) of every import of a module, except those for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    within_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        now = id(node) not in within_functions
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", now) for alias in node.names)


def module_of(name: str) -> str:
    """The package's module that a dotted name refers to or lies in."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__version__"


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_from_itself_and_from_those_below(module: str) -> None:
    ours = {module_of(name) for name, _ in imports(MODULES[module]) if name.startswith("megatron_aspo")}
    assert [m for m in ours if ROOMS.index(room(m)) > ROOMS.index(room(module))] == []


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_stay_in_their_rooms(module: str) -> None:
    found = {name.partition(".")[0] for name, _ in imports(MODULES[module])}
    place = module.removeprefix("megatron_aspo.")
    for package, places in ONLY_IN.items():
        assert package not in found or place.startswith(places), f"{module} imports {package}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {module_of(name) for name, _ in imports(path) if name.startswith("megatron_aspo")} - {module}
        for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_modules_and_tests_can_be_read_in_one_sitting() -> None:
    def longer(paths: Iterator[Path] | list[Path], limit: int) -> list[str]:
        return [path.name for path in paths if len(path.read_text().splitlines()) > limit]

    assert longer([*MODULES.values()], 350) == []
    assert longer(TESTS.rglob("*.py"), 600) == []


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(PACKAGE) for path in MODULES.values()}), ids=str)
def test_no_module_shadows_the_standard_library(folder: Path) -> None:
    """Python started in a folder of the package finds the folder's modules first."""
    run = "import random, pdb, logging.handlers, tempfile, concurrent.futures"
    subprocess.run([sys.executable, "-c", run], cwd=PACKAGE / folder, check=True)


def test_the_loss_needs_torch_alone() -> None:
    """No other dependency of the project can be imported; torch itself works without numpy."""
    blocked = (
        *("megatron", "transformer_engine", "triton", "vllm", "transformers", "numpy", "omegaconf", "yaml", "rich"),
        *("tensorboard", "matplotlib", "psutil", "reasoning_gym", "pydantic", "pebble"),
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
ours = {name.split(".")[1] for name in sys.modules if name.startswith("megatron_aspo.")}
print(loss_sum.item(), denominator.item(), logits.grad[0, 1].item(), *sorted(ours))
"""
    loss, denominator, gradient, *ours = run_python(BLOCK.format(blocked=blocked) + use).split()
    assert (float(loss), int(denominator), float(gradient)) == (-4, 4, 0.125)
    assert ours == ["config", "errors", "loss"]


def foreign_attributes_set(path: Path) -> list[str]:
    """Attributes of objects imported from outside the package that a module assigns or sets."""
    tree = ast.parse(path.read_text())
    foreign: set[str] = set()
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("megatron_aspo"):
            foreign |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            found.append(ast.unparse(node.args[0]))
    return [name for name in found if name.partition(".")[0] in foreign]


PATCHED = {
    "background": {"async_utils", "filesystem_async"},
    "cpu.gated_delta": {"mcore_common.HAVE_FLA"},
    "hf.bridge": {"GLM45Bridge"},
    "layer_specs": {"GatedDeltaNet"},
    "rotary": {"mcore_rope"},
    "router_replay": {"mcore_router.topk_routing_with_score_function"},
    "shard_grid": {"_internals._find_nd_overlapping_shards"},
}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_room_for_cpus_patches_other_packages(module: str) -> None:
    if module.startswith("megatron_aspo.tools.rehearsal."):
        return  # it patches processes that do nothing else
    patched = foreign_attributes_set(MODULES[module])
    if module == "megatron_aspo.policy.cpu.cuda":
        assert "torch.Tensor.cuda" in patched
    else:
        assert set(patched) == PATCHED.get(module.removeprefix("megatron_aspo.policy."), set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Megatron's functions are compiled")
def test_a_rank_on_a_cpu_starts_without_the_compiler() -> None:
    """torch's compiler takes a third of the import time. A later call of torch.compile still works."""
    use = """
import sys, megatron_aspo.commands.train, torch
from megatron.core.fusions.fused_bias_swiglu import swiglu
print(*{"torch._dynamo", "torch._inductor"} & set(sys.modules))
print(torch.compile.__module__, hasattr(swiglu, "__wrapped__"))
"""
    assert run_python(use).split() == ["torch", "False"]
