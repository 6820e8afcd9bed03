"""The Triton kernels against the torch reference: on CPU in Triton's interpreter, and compiled for a GPU.

The interpreter replaces Triton's own functions too, so the switch must be set before Triton is first imported, and
Megatron-Core imports it. Hence the interpreted kernels run in a separate process. With a GPU they run on it.
"""

import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_aspo.loss import softmax, vocab_parallel_logprobs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
CLOSE: dict[str, Any] = {"rtol": 2e-5 if ON_GPU else 1e-6, "atol": 1e-30}  # a GPU's exp is approximate
GRADIENT_CLOSE: dict[
    torch.dtype, dict[str, Any]
] = {  # absolute: where the target's 1 and p cancel. The interpreter truncates to bfloat16.
    torch.float32: {"rtol": CLOSE["rtol"], "atol": CLOSE["rtol"] / 10},
    torch.bfloat16: {"rtol": 2**-7, "atol": CLOSE["rtol"] / 10},
    torch.float16: {"rtol": 2**-10, "atol": 1e-7},
}
TILE = 2048

Run = Callable[..., Any]


def interpret() -> None:
    """Prepare the interpreter's process."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    def fused_multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        total = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    # Triton's own version rounds the product.
    interpreter.InterpreterBuilder.create_fma = fused_multiply_add  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Call a function where the kernels run. Tensors travel as shared memory, so the caller sees in-place writes."""
    if ON_GPU:
        yield lambda function, *args, **kwargs: function(*args, **kwargs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=interpret) as process:
        yield lambda function, *args, **kwargs: process.submit(function, *args, **kwargs).result()


@pytest.fixture(autouse=True)
def the_reference_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(softmax.KERNELS_VARIABLE, "torch")


def kernel_statistics(*args: Any) -> Tensor:
    from megatron_aspo.loss import kernels

    assert kernels.TILE == TILE
    return kernels.statistics(*args)


def kernel_gradient(*args: Any) -> None:
    from megatron_aspo.loss import kernels

    assert kernels.gradient(*args) is args[6]


def random_logits(n: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + V)
    return (scale * torch.randn(n, V, generator=generator)).to(dtype).to(DEVICE)


def some_targets(n: int, V: int) -> Tensor:
    """Targets that include -1, the first, the last and random ids."""
    targets = torch.randint(-1, V, (n,), generator=torch.Generator().manual_seed(n))
    edges = torch.tensor([V - 1, -1, 0 if V else -1])[:n]
    targets[: len(edges)] = edges
    return targets.to(DEVICE)


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def extremes(dtype: torch.dtype) -> Tensor:
    """Rows longer than a tile, whose running maximum jumps far, late or never."""
    inf, large = math.inf, float(torch.finfo(dtype).max) * 0.9
    rows = torch.zeros(9, TILE + 1000)
    rows[0] = -inf
    rows[1, :-1] = -inf
    rows[2, 1::2] = -inf
    rows[3, -1] = large
    rows[4] = -large
    rows[5] = 1e4
    rows[5, :TILE] = -1e4
    rows[6, 7] = 1e4
    rows[7, ::2] = large
    rows[7, 1::2] = -large
    rows[8] = -1e30 if large > 1e30 else -1e4
    return rows.to(dtype).to(DEVICE)


def assert_statistics_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert not expected.isnan().any()
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    torch.testing.assert_close(actual[1], expected[1], **CLOSE)
    torch.testing.assert_close(actual[2], expected[2], **CLOSE)
    torch.testing.assert_close(actual[3], expected[3], **EXACT)


def check(run: Run, logits: Tensor, targets: Tensor, temperature: float) -> None:
    stats = softmax.statistics(logits, targets, temperature)
    assert_statistics_equal(run(kernel_statistics, logits, targets, temperature), stats)
    # A row of -inf is possible: the other shards of the vocabulary have the finite logits.
    log_normalizer = (stats[0] + stats[1].log()).nan_to_num(neginf=0.0)
    n = len(logits)
    vectors: Any = (targets, log_normalizer, vector(n, 2).abs(), vector(n, 1))
    check_gradient(
        run, logits, (*vectors, vector(n, 3)), torch.full_like(logits, 7.0, dtype=torch.bfloat16), temperature
    )
    check_gradient(run, logits, (*vectors, vector(n, 3)), logits, temperature)
    check_gradient(run, logits, (*vectors, None), logits, temperature)


def check_gradient(run: Run, logits: Tensor, vectors: Any, out: Tensor, temperature: float = 1.0) -> None:
    """Compare gradients written to `out`, or in place on a copy if `out` is `logits`."""
    arguments: Any = (logits, *vectors, torch.empty_like(out), temperature)
    expected = softmax.gradient(*arguments)
    assert not expected.isnan().any()
    if out is logits:
        out = logits = logits.clone()
    run(kernel_gradient, logits, *vectors, out, temperature)
    torch.testing.assert_close(out, expected, **GRADIENT_CLOSE[out.dtype])


SIZES = {0: (0, 7), 1: (0, 1, 7, 1000, TILE, TILE + 1), 3: (0, 2 * TILE + 5), 17: (129,)}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_reference(run: Run, dtype: torch.dtype, n: int, temperature: float) -> None:
    for V in SIZES[n]:
        check(run, random_logits(n, V, dtype), some_targets(n, V), temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits(run: Run, dtype: torch.dtype, temperature: float) -> None:
    logits = extremes(dtype)
    n, V = logits.shape
    check(run, logits, torch.arange(n, device=DEVICE) * (V // n), temperature)
    check(run, logits, torch.full((n,), V - 1, device=DEVICE), temperature)


def test_a_row_of_minus_infinity(run: Run) -> None:
    stats = run(kernel_statistics, torch.full((1, 9), -math.inf, device=DEVICE), some_targets(1, 9))
    assert stats[:, 0].tolist() == [torch.tensor(-1e30).item(), 0.0, 0.0, -math.inf]


def test_nan_is_not_hidden(run: Run) -> None:
    logits = random_logits(2, 9)
    logits[1, 3] = math.nan
    _, s, q, _ = run(kernel_statistics, logits, some_targets(2, 9))
    assert s.isnan().tolist() == q.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_lie_apart(run: Run, dtype: torch.dtype) -> None:
    """Rows are a slice of padded logits; the surrounding values must not change."""
    n, V = 3, TILE + 77
    wide = random_logits(n + 1, V + 51, dtype)
    original = wide.clone()
    logits, targets = wide[1:, 3 : V + 3], some_targets(n, V)
    vectors: Any = (targets, vector(n, 1) + 20, vector(n, 3), vector(n, 2), None)
    assert_statistics_equal(run(kernel_statistics, logits, targets), softmax.statistics(logits, targets))
    arguments: Any = (logits, *vectors, torch.empty_like(logits))
    expected = softmax.gradient(*arguments)
    run(kernel_gradient, logits, *vectors, logits)
    torch.testing.assert_close(wide[1:, 3 : V + 3], expected, **GRADIENT_CLOSE[dtype])
    original[1:, 3 : V + 3] = wide[1:, 3 : V + 3]
    torch.testing.assert_close(wide, original, **EXACT)


def test_any_strides(run: Run) -> None:
    """Transposed logits, and vectors that are slices or expanded scalars."""
    n, V = 3, 40
    logits, targets = random_logits(V, n).T, some_targets(2 * n, V)[::2]
    assert_statistics_equal(run(kernel_statistics, logits, targets), softmax.statistics(logits, targets))
    ones = torch.ones((), device=DEVICE).expand(n)
    vectors = (targets, vector(2 * n, 1)[::2] + 20, vector(2 * n, 2)[::2], ones, ones)
    check_gradient(run, logits, vectors, torch.zeros(n, V, device=DEVICE))


def logprobs_and_gradient(choice: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Results of the public function, with padded vocabulary, under a choice of kernels."""
    os.environ[softmax.KERNELS_VARIABLE] = choice
    leaf = random_logits(6, 300, dtype).view(2, 3, 300).requires_grad_()
    targets = torch.arange(6, device=DEVICE).view(2, 3)
    logprobs, entropy = vocab_parallel_logprobs(leaf, targets, None, temperature=0.7, vocab_size=290)
    (logprobs + 0.1 * entropy).sum().backward()
    assert leaf.grad is not None
    assert choice == "torch" or "megatron_aspo.loss.kernels" in sys.modules
    return logprobs.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_public_function(run: Run, dtype: torch.dtype) -> None:
    logprobs, entropy, gradient = run(logprobs_and_gradient, "triton", dtype)
    expected = run(logprobs_and_gradient, "torch", dtype)
    torch.testing.assert_close(logprobs, expected[0], rtol=CLOSE["rtol"], atol=1e-6)
    torch.testing.assert_close(entropy, expected[1], rtol=CLOSE["rtol"], atol=1e-6)
    torch.testing.assert_close(gradient, expected[2], rtol=GRADIENT_CLOSE[dtype]["rtol"], atol=3e-6)


def test_another_choice_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(softmax.KERNELS_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="MEGATRON_ASPO_KERNELS='cuda' is not one of auto, torch, triton"):
        softmax.statistics(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


VECTORS = dict.fromkeys(("log_normalizer", "grad_logprobs", "entropy", "grad_entropy"), "*fp32")
COMPILED = {
    "statistics-bf16": ("_statistics", "bf16", "fp32", {"TEMPERED": False}),
    "statistics-fp32-all": ("_statistics", "fp32", "fp32", {"TEMPERED": True}),
    "statistics-one-column": ("_statistics", "bf16", "fp32", {"TEMPERED": True, "columns": 1, "n": 1}),
    "gradient-bf16": ("_gradient", "bf16", "bf16", {"TEMPERED": False, "grad_entropy": None}),
    "gradient-fp32-to-bf16-all": ("_gradient", "fp32", "bf16", {"TEMPERED": True}),
    "gradient-one-column": ("_gradient", "bf16", "bf16", {"TEMPERED": True, "columns": 1}),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_for_a_gpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile to an H100's machine code, which needs no GPU: loads are wide, and registers suffice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_aspo.loss import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, logits_type, out_type, constants = COMPILED[case]
    kernel = getattr(kernels, name)
    size = 2 if logits_type == "bf16" else 4
    threads = 32 * kernels.WARPS
    shape = {"THREADS": threads, "VECTOR": 16 // size, "UNROLL": kernels.TILE * size // (16 * threads)}
    if name == "_gradient":
        shape = {"TILE": kernels.TILE}
    constants = constants | shape
    integers = dict.fromkeys(("stride", "columns", "out_stride", "n"), "i32")
    pointers = {"logits": f"*{logits_type}", "out": f"*{out_type}", "targets": "*i64"}
    argument_types = VECTORS | integers | pointers | {"temperature": "fp32"}
    signature = {n: "constexpr" if n in constants else argument_types[n] for n in kernel.arg_names}
    # Triton specializes at launch: addresses and row strides are multiples of 16; `columns` may not be.
    aligned = [n for n in ("logits", "out", "stride", "out_stride") if n in signature]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(n),): value for n, value in constants.items()},
        {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": kernels.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    assert re.search(r"arith\.muli %\S+, %\S+ : i64", compiled.asm["ttir"])  # row * stride
    assert "convert_layout" not in compiled.asm["ttgir"]
    if "columns" not in constants:
        assert "ld.global.v4.b32" in compiled.asm["ptx"]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    print(f"{case}: {registers} registers, {stack} bytes of stack")
    assert registers <= 80  # 6 rows share a multiprocessor
    assert stack == 0
