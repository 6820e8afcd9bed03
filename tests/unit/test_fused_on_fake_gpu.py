"""The fused head's path for GPUs at full size, on tensors without memory. No values are computed. Every operator
still checks its types and shapes, allocations are counted, and reading a value is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counting import Count
from megatron_aspo.loss import (
    PolicyLossConfig,
    TokenInputs,
    TokenTerms,
    fused_gradients,
    fused_linear_logprobs,
    fused_linear_policy_loss,
    megatron_loss_func,
    output_layer,
    policy_loss,
    softmax,
)

T, H, V, CHUNK = 16384, 5120, 152064 // 8, 2048  # Qwen2.5-32B at TP = 8
CONFIGS = {
    "aspo": PolicyLossConfig(entropy_coef=0.01),
    "response-wise": PolicyLossConfig(objective="gspo", aggregation="seq-mean-token-mean"),
    "everything": PolicyLossConfig(
        objective="response_mean_is",
        aggregation="seq-mean-token-sum",
        entropy_quantile=0.8,
        kl_coef=0.1,
        rollout_correction="mask",
        rollout_sequence_high=2.0,
        rollout_veto=0.1,
    ),
}


class Operators(TorchDispatchMode):
    """Records the names of all called operators, and fails if the output size of one depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        assert not any(name in str(func) for name in ("aten.nonzero", "aten._unique", "aten.masked_select"))
        return func(*args, **(kwargs or {}))


class Readings(TorchFunctionMode):
    """Counts the calls that copy a tensor's values to Python; each of them synchronizes with a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.count += name in ("tolist", "item", "cpu", "numpy", "equal", "is_nonzero")
        self.count += name in ("__bool__", "__int__", "__float__", "__index__")
        return func(*args, **(kwargs or {}))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def head(main_grad: bool = True, tokens: int = T) -> dict[str, Any]:
    weight: Any = torch.nn.Parameter(empty(V, H, dtype=torch.bfloat16))
    if main_grad:
        weight.main_grad = empty(V, H)
    hidden = empty(tokens, H, dtype=torch.bfloat16).requires_grad_()
    return {"hidden": hidden, "weight": weight, "targets": empty(tokens, dtype=torch.long)}


def per_token(counted: int = T) -> dict[str, Any]:
    return {
        "old_logprobs": empty(T),
        "advantages": empty(T),
        "loss_mask": empty(T) > 0,
        "ref_logprobs": empty(T),
        "rollout_logprobs": empty(T),
        "sequence_ids": empty(T, dtype=torch.long),
        "positions": empty(counted, dtype=torch.long),
    }


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(softmax.KERNELS_VARIABLE, "torch")  # Triton cannot launch without a GPU


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_a_32b_head_on_a_gpu(main_grad: bool, entropy_coef: float) -> None:
    with FakeTensorMode():
        inputs, config = head(main_grad) | per_token(), PolicyLossConfig(entropy_coef=entropy_coef)
        with Count() as count:
            out = fused_linear_policy_loss(**inputs, config=config, chunk_size=CHUNK)
        assert out.loss_sum.requires_grad
        assert out.logprobs.shape == (T,)
        assert out.logprobs.dtype == torch.float32
    inputs_gradients = 2 * T * H + (0 if main_grad else 4 * H * V)
    # Logits in float32, their gradient in bfloat16, and tiles of 64 MiB, which the Triton kernels do not need.
    assert count.peak - inputs_gradients < 6 * CHUNK * V + 6 * 4 * (1 << 24) + 160 * T


@pytest.mark.skipif(not output_layer.FLOAT32_PRODUCTS, reason="this torch has no mm(out_dtype=)")
@pytest.mark.parametrize("newer", [True, False], ids=["torch 2.8", "torch 2.6"])
def test_without_float32_products_the_gemms_are_of_the_weights_type(
    newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (output_layer, fused_gradients):
        monkeypatch.setattr(module, "FLOAT32_PRODUCTS", newer)
    with FakeTensorMode(), Operators() as operators:
        fused_linear_policy_loss(**head(), **per_token(), config=PolicyLossConfig(), chunk_size=CHUNK)
    products = {name for name in operators.called if name.startswith(("aten.mm", "aten.addmm"))}
    with_type = {"aten.mm.dtype_out", "aten.addmm.dtype_out"}
    assert products & with_type == (with_type if newer else set())
    assert newer or {"aten.mm.out", "aten.mm.default"} <= products


@pytest.mark.parametrize("counted", [T, T // 3])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_with_positions_a_loss_never_waits_for_the_gpu(config: PolicyLossConfig, counted: int) -> None:
    """A fake tensor has no values: reading one is an error, and so is an output whose size depends on one."""
    with FakeTensorMode(), Operators() as operators:
        inputs = head() | per_token(counted)
        out = fused_linear_policy_loss(**inputs, config=config, chunk_size=CHUNK)
        backward: Any = out.loss_sum.grad_fn
        backward.apply(torch.empty((), device="cuda"))  # autograd's engine would request a GPU stream
        fused_linear_logprobs(
            *(inputs[name] for name in ("hidden", "weight", "targets")), positions=inputs["positions"]
        )
        tensors = per_token(counted) | {"targets": inputs["targets"]}
        logits = empty(T, V, dtype=torch.bfloat16).requires_grad_()
        megatron_loss_func(logits, **tensors, config=config, tp_group=None)
    assert any(name.startswith("aten.mm") for name in operators.called)


def on_cpu(entry: str, config: PolicyLossConfig, with_positions: bool = False) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rest: dict[str, Any] = {name: -normal(12).abs() for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    rest |= {"advantages": normal(12), "loss_mask": normal(12) > 0, "sequence_ids": torch.arange(12) // 5}
    rest |= {"positions": rest["loss_mask"].nonzero()[:, 0]} if with_positions else {}
    hidden, weight, targets = normal(12, 4).requires_grad_(), normal(9, 4), torch.randint(9, (12,), generator=generator)
    if entry == "fused":
        return lambda: fused_linear_policy_loss(hidden, weight, targets, **rest, config=config, chunk_size=3)
    if entry == "logits":
        logits = normal(12, 9).requires_grad_()
        return lambda: megatron_loss_func(logits, targets=targets, **rest, config=config, tp_group=None)
    return lambda: policy_loss(normal(12).requires_grad_(), entropy=normal(12).abs(), **rest, config=config)


def half(x: TokenInputs, config: PolicyLossConfig) -> TokenTerms:
    return TokenTerms.from_weight(x, torch.full_like(x.ratio, 0.5))


def test_a_users_objective_is_read_once_however_many_chunks_there_are() -> None:
    call = on_cpu("fused", PolicyLossConfig(objective=f"{__name__}:half"), with_positions=True)
    with Operators(), Readings() as readings:
        call()
    assert readings.count == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("entry", "waits"), [("fused", 1), ("logits", 1), ("logprobs", 0)])
def test_without_positions_it_waits_once(entry: str, waits: int, config: PolicyLossConfig) -> None:
    """Counted on the CPU: the check of ids, and the number of tokens, in one transfer."""
    call = on_cpu(entry, config)
    with Operators(), Readings() as readings:
        call()
    assert readings.count == waits
