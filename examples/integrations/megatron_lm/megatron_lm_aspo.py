"""ASPO for Megatron-LM: forward step and loss function for `train_rl.py` and for plain loops. See README.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_aspo import loss as aspo
from megatron_aspo.loss import PolicyLossConfig
from megatron_aspo.loss.validation import check_shapes


def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any, config: PolicyLossConfig, **options: Any) -> Any:
    """A forward step for your own loop: `partial(forward_step, config=...)` is a `forward_step_func`.

    The iterator yields dicts of tensors [batch, sequence]: tokens, position_ids, and the fields of `TokenBatch`.
    """
    batch = dict(next(data_iterator))
    return aspo_step(model, batch.pop("tokens"), batch.pop("position_ids"), batch, config, **options)


def aspo_step(
    model: Any,
    tokens: Tensor,
    position_ids: Tensor,
    batch: dict[str, Any],
    config: PolicyLossConfig,
    packed_seq_params: Any = None,
    fused: bool = True,
) -> tuple[Any, Any]:
    """Output and loss function. `fused` makes no logits; otherwise they stay split over tensor-parallel ranks."""
    megatron = get_model_config(model)
    if not megatron.calculate_per_token_loss:
        raise ValueError("ASPO's loss is a sum over tokens: run Megatron with --calculate-per-token-loss")
    # The vocabulary's padding keeps its probability (no vocab_size): Megatron-LM's old log-probs have it too.
    tp_group, cp_group = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    arguments = {**batch, "tp_group": tp_group, "cp_group": cp_group, "config": config}
    options: dict[str, Any] = {"packed_seq_params": packed_seq_params, "runtime_gather_output": False}
    if not fused and (megatron.bf16 or megatron.fp16):
        options["fp32_output"] = False  # Megatron's wrapper of such models would copy the logits to float32
    run = partial(aspo.megatron_forward, model, head=aspo.megatron_loss_head, context=arguments) if fused else model
    output = run(tokens, position_ids, None, **options)
    return output, partial(loss_func, **arguments)


def loss_func(output: Any, **arguments: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss sum, denominator, and metrics as Megatron-LM's training loop averages them: [sum, count] each."""
    fused = isinstance(output, aspo.LossOutput)
    found = aspo.megatron_loss_tuple(output) if fused else aspo.megatron_loss_func(output, **arguments)
    loss_sum, denominator, reported = found
    # A mean over no token must be 0: Megatron-LM treats NaN as a failed iteration.
    pairs = {name: torch.stack([total, count.clamp(min=1e-6)]) for name, (total, count) in reported["metrics"].items()}
    return loss_sum, denominator, {f"aspo/{name}": pair for name, pair in pairs.items()}


def rl_config(args: Any, **loss: Any) -> PolicyLossConfig:
    """The loss that `train_rl.py`'s flags configure, with the exact entropy in the entropy term; `loss` overrides."""
    flagged = "truncate" if args.rl_inference_logprobs_is_correction and loss.get("anchor") != "rollout" else "none"
    flags = {
        "objective": "aspo",
        "clip_low": args.grpo_clamp_eps_lower,
        "clip_high": args.grpo_clamp_eps_upper,
        "kl_coef": args.grpo_kl_beta,
        "entropy_coef": args.grpo_entropy_term_weight,
        "rollout_correction": loss.get("rollout_correction", flagged),
    }
    # No ratio exceeds e^20. A correction that `loss` names has the library's bounds instead.
    high = args.rl_importance_sampling_truncation_coef or (None if "rollout_correction" in loss else 1e9)
    if flags["rollout_correction"] == "truncate" and high:
        flags |= {"rollout_ratio_low": 0.0, "rollout_ratio_high": high}
    return PolicyLossConfig(**flags | loss)


def rl_batch(
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    loss_mask: Tensor,
    ref_logprobs: Tensor | None = None,
    inference_logprobs: Tensor | None = None,
    seq_starts: Sequence[int] | None = None,
    seq_lengths: Sequence[int] | None = None,
) -> dict[str, Tensor | None]:
    """The variables of `train_rl.py`'s forward step as fields of `TokenBatch`: tokens [batch, sequence] or a packed bin
    [1, T], log-probs and mask shorter by 1, advantages [sequences]."""
    if parallel_state.get_context_parallel_world_size() > 1:
        raise ValueError("train_rl.py's batches are not split for context parallelism: run with 1 such rank")
    check_shapes([len(tokens if seq_starts is None else seq_starts)], "one per sequence", advantages=advantages)
    ids = torch.arange(tokens.shape[0], device=tokens.device)[:, None].repeat(1, tokens.shape[1])
    for i, (start, length) in enumerate(zip(seq_starts or (), seq_lengths or (), strict=True)):
        ids[0, start : start + length] = i  # tokens outside all sequences are masked
    labels = {"targets": tokens[:, 1:], "loss_mask": loss_mask, "old_logprobs": old_logprobs}  # the last has none
    labels |= {"ref_logprobs": ref_logprobs, "rollout_logprobs": inference_logprobs}
    batch = {name: None if value is None else torch.nn.functional.pad(value, (0, 1)) for name, value in labels.items()}
    return {**batch, "advantages": torch.nn.functional.pad(advantages.float(), (0, 1))[ids], "sequence_ids": ids}
