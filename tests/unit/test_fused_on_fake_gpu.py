"""The fused head's path for GPUs at full size, on tensors without memory: nothing is computed, but every operator
that it calls checks its types and shapes, and what it would allocate is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counting import Count
from megatron_aspo.loss import PolicyLossConfig, fused_linear, fused_linear_policy_loss, softmax, validation

T, H, V, CHUNK = 16384, 5120, 152064 // 8, 2048  # Qwen2.5-32B at TP = 8


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_a_32b_head_on_a_gpu(main_grad: bool, entropy_coef: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(softmax.KERNELS_VARIABLE, "torch")  # Triton launches nothing without a GPU
    for name in ("check_token_ids", "check_some_token"):  # they look at values
        monkeypatch.setattr(validation, name, lambda *_: None)
    all_count = staticmethod(lambda states, _: fused_linear._States(states, None))
    monkeypatch.setattr(fused_linear._States, "of", all_count)
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        hidden = empty(T, H, dtype=torch.bfloat16).requires_grad_()
        weight: Any = torch.nn.Parameter(empty(V, H, dtype=torch.bfloat16))
        if main_grad:
            weight.main_grad = empty(V, H)
        config = PolicyLossConfig(entropy_coef=entropy_coef)
        old, advantages, mask = empty(T), empty(T), empty(T) > 0
        with Count() as count:
            out = fused_linear_policy_loss(
                hidden, weight, empty(T, dtype=torch.long), old, advantages, mask, config, chunk_size=CHUNK
            )
        assert out.loss_sum.requires_grad
        assert out.logprobs.shape == (T,)
        assert out.logprobs.dtype == torch.float32
    inputs_gradients = 2 * T * H + (0 if main_grad else 4 * H * V)
    # Logits in float32, their gradient in bfloat16, and tiles of 64 MiB, which the Triton kernels do without.
    assert count.peak - inputs_gradients < 6 * CHUNK * V + 6 * 4 * (1 << 24) + 100 * T
