"""ASPO for Megatron-LM: what its schedules call, for `train_rl.py` and for plain training loops. See README.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_aspo.loss import LossOutput, PolicyLossConfig, megatron_loss_func, megatron_loss_head, megatron_loss_tuple
from megatron_aspo.loss.validation import check_arguments, check_shapes, named_as


def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any, config: PolicyLossConfig, **options: Any) -> Any:
    """For a loop of one's own: `partial(forward_step, config=...)` is a `forward_step_func` of Megatron's schedules.

    The iterator yields dicts of tensors [batch, sequence]: tokens, position_ids, and by name what `megatron_loss_func`
    takes, said of the label at each position: targets, advantages, loss_mask, old_logprobs, ...
    """
    batch = dict(next(data_iterator))
    if missing := {"tokens", "position_ids"} - batch.keys():
        raise ValueError(f"the batch lacks {' and '.join(sorted(missing))}: the model takes them, [batch, sequence]")
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
    """Output and loss function. `fused` makes no logits; without, they stay split over tensor-parallel ranks."""
    megatron = get_model_config(model)
    if not megatron.calculate_per_token_loss:
        raise ValueError("ASPO's loss is a sum over tokens: run Megatron with --calculate-per-token-loss")
    # The vocabulary's padding keeps its probability (no vocab_size): Megatron-LM's old log-probs have it too.
    tp_group, cp_group = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_context_parallel_group()
    arguments = {**batch, "tp_group": tp_group, "cp_group": cp_group, "config": config}
    options: dict[str, Any] = {"packed_seq_params": packed_seq_params, "runtime_gather_output": False}
    if megatron.bf16 or megatron.fp16:
        options["fp32_output"] = False  # Megatron's wrapper of such models would copy the logits to float32
    if fused:
        options |= {"output_processor": megatron_loss_head, "output_processor_context": arguments}
    output = model(tokens, position_ids, None, **options)
    return output, partial(loss_func, **arguments)


def loss_func(output: Any, **arguments: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss sum, denominator, and metrics as Megatron-LM's training loop averages them: [sum, count] each."""
    if not (made := isinstance(output, LossOutput)):  # the fused head has checked its own
        check_arguments("batch", arguments, megatron_loss_func, ("logits",))
    loss_sum, denominator, reported = megatron_loss_tuple(output) if made else megatron_loss_func(output, **arguments)
    # A mean over no token at all shall read 0: Megatron-LM takes NaN for a failed iteration.
    pairs = {name: torch.stack([total, count.clamp(min=1e-6)]) for name, (total, count) in reported["metrics"].items()}
    return loss_sum, denominator, {f"aspo/{name}": pair for name, pair in pairs.items()}


def rl_config(args: Any) -> PolicyLossConfig:
    """What `train_rl.py`'s flags ask for; the entropy term is the exact entropy's."""
    flags = {"clip_low": "grpo_clamp_eps_lower", "clip_high": "grpo_clamp_eps_upper"}
    flags |= {"kl_coef": "grpo_kl_beta", "entropy_coef": "grpo_entropy_term_weight"}
    with named_as({ours: f"--{flag.replace('_', '-')}" for ours, flag in flags.items()}):
        return PolicyLossConfig(
            objective="aspo",
            rollout_correction="truncate" if args.rl_inference_logprobs_is_correction else "none",
            rollout_ratio_low=0.0,
            rollout_ratio_high=args.rl_importance_sampling_truncation_coef or 1e9,  # no ratio exceeds e^20
            **{ours: getattr(args, flag) for ours, flag in flags.items()},
        )


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
    """The variables of `train_rl.py`'s forward step as `batch`: tokens [batch, sequence], or of packed ones a bin
    [1, T]; log-probs and mask shorter by 1; advantages [sequences]. Another number of them is a ValueError."""
    if parallel_state.get_context_parallel_world_size() > 1:
        raise ValueError("train_rl.py's batches are not parted for context parallelism: run with 1 such rank")
    check_shapes([len(tokens if seq_starts is None else seq_starts)], "one per sequence", advantages=advantages)
    ids = torch.arange(tokens.shape[0], device=tokens.device)[:, None].repeat(1, tokens.shape[1])
    for i, (start, length) in enumerate(zip(seq_starts or (), seq_lengths or (), strict=True)):
        ids[0, start : start + length] = i  # what no sequence covers is masked
    labels = {"targets": tokens[:, 1:], "loss_mask": loss_mask, "old_logprobs": old_logprobs}  # the last has none
    labels |= {"ref_logprobs": ref_logprobs, "rollout_logprobs": inference_logprobs}
    batch = {name: None if value is None else torch.nn.functional.pad(value, (0, 1)) for name, value in labels.items()}
    return {**batch, "advantages": torch.nn.functional.pad(advantages.float(), (0, 1))[ids], "sequence_ids": ids}
