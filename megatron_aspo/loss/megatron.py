"""The loss in the forms that Megatron-Core takes; imports no Megatron itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss import validation
from megatron_aspo.loss.collectives import group_size
from megatron_aspo.loss.fused_linear import fused_linear_logprobs, fused_linear_policy_loss
from megatron_aspo.loss.logprobs import vocab_parallel_logprobs
from megatron_aspo.loss.reduction import policy_loss
from megatron_aspo.loss.tokens import check_inputs
from megatron_aspo.types import LossOutput

LossTuple = tuple[Tensor, Tensor, dict[str, Any]]
"""(loss_sum, denominator as int32, {"metrics": name -> (sum, count), "maxima": name -> scalar})."""

_FILLED = ("hidden", "weight", "loss_scale", "allow_empty")
"""What the heads give to the fused functions themselves, whatever the caller says."""


def megatron_loss_func(
    logits: Tensor,
    *,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    config: PolicyLossConfig,
    tp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> LossTuple:
    """The policy loss in the form that Megatron-Core's schedules take from a forward step.

    Use it as `return model(...), partial(megatron_loss_func, targets=..., ...)` with
    `calculate_per_token_loss=True`: the schedule sums what is returned over micro-batches, and
    `finalize_model_grads` divides the gradients by the denominator summed over data- and context-parallel
    ranks. So nothing here is scaled by ranks or micro-batches, and the gradient is that of any other layout.

    Args:
        logits: [..., V/tp], the model's parallel output.
        targets, advantages, loss_mask, old_logprobs, ...: [...], as in `policy_loss`; a micro-batch may be empty.
        tp_group, temperature, vocab_size: as in `vocab_parallel_logprobs`.
    """
    # All of it before the log-probs' collective.
    validation.check_tensors(logits=logits, targets=targets)
    validation.check_shapes(logits.shape[:-1], "that of logits without the vocabulary", targets=targets)
    check_inputs(
        targets.shape,
        config,
        cp_group,
        loss_mask=loss_mask,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        sequence_ids=sequence_ids,
    )
    logprobs, entropy = vocab_parallel_logprobs(
        logits, targets, tp_group, temperature=temperature, vocab_size=vocab_size, loss_mask=loss_mask
    )
    return megatron_loss_tuple(
        policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            loss_mask,
            config,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            sequence_ids=sequence_ids,
            cp_group=cp_group,
            allow_empty=True,
        )
    )


def megatron_loss_tuple(output: LossOutput) -> LossTuple:
    """What Megatron-Core's schedules take as the result of a forward step's loss function.

    Use it as the loss function beside a model that returns a `LossOutput`, that is with `megatron_loss_head`.
    """
    return output.loss_sum, output.denominator.int(), {"metrics": output.metrics, "maxima": output.maxima}


def megatron_loss_head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, context: Any, **_: Any
) -> LossOutput:
    """The fused head in the place of GPTModel's output layer: its `output_processor`.

    In a forward step, with `calculate_per_token_loss=True`::

        output = model(tokens, positions, None, output_processor=megatron_loss_head,
                       output_processor_context={"targets": labels, "old_logprobs": old, ...})
        return output, megatron_loss_tuple

    No logits are made. The gradient of the output weight goes to its `main_grad` during the forward pass: evaluate
    under `torch.no_grad()`.

    Args:
        context: the keyword arguments of `fused_linear_policy_loss`, tensors in Megatron's order [batch, sequence];
            what the model knows (hidden, weight, tp_group, sequence_parallel, loss_scale) is filled in.
        hidden_states: [sequence, batch, H], with sequence parallelism this rank's 1/tp of the sequence.
        output_layer, output_weight, config: as GPTModel hands them over.

    Raises:
        ValueError: the context has an unknown name or lacks one; shapes, types, ids, groups or numbers do not fit; the
            model has what the head does not know. Before any collective.
    """
    if not config.calculate_per_token_loss:
        raise ValueError("megatron_loss_head needs calculate_per_token_loss=True in Megatron's TransformerConfig")
    arguments = _arguments(fused_linear_policy_loss, context, output_layer, hidden_states)
    scale = config.grad_scale_func
    output = fused_linear_policy_loss(
        hidden_states,
        _weight(output_layer, output_weight, config),
        **arguments,
        loss_scale=1.0 if scale is None else scale(torch.ones((), device=hidden_states.device)),
        allow_empty=True,
    )
    return replace(
        output,
        logprobs=output.logprobs.transpose(0, 1),
        entropy=None if output.entropy is None else output.entropy.transpose(0, 1),
    )


def megatron_logprobs_head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, context: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [batch, sequence] without gradient in the place of GPTModel's output layer, as
    `output_processor`: for old and reference policies.

    Args:
        context: the keyword arguments of `fused_linear_logprobs`; see `megatron_loss_head`.

    Raises:
        ValueError: as `megatron_loss_head`.
    """
    arguments = _arguments(fused_linear_logprobs, context, output_layer, hidden_states)
    logprobs, entropy = fused_linear_logprobs(hidden_states, _weight(output_layer, output_weight, config), **arguments)
    return logprobs.transpose(0, 1), entropy.transpose(0, 1)


def _weight(output_layer: Any, output_weight: Tensor | None, config: Any) -> Tensor:
    """The output layer's weight, which may be the embedding's."""
    if getattr(config, "use_mup", False) or output_layer.bias is not None:
        raise ValueError("the fused head knows neither muP's scaled logits nor a bias of the output layer")
    if getattr(config, "mtp_num_layers", None):
        # Their gradient of the same weight would be lost beside one that is in main_grad already.
        raise ValueError("the fused head does not go with multi-token prediction (mtp_num_layers)")
    # What hangs on the layer's call must happen before its weight is read: Megatron waits there for parameters that
    # are being gathered (overlap_param_gather).
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    return output_layer.weight if output_weight is None else output_weight


def _arguments(function: Callable[..., Any], context: Any, output_layer: Any, hidden_states: Tensor) -> dict[str, Any]:
    """The fused function's, from what the caller gave and the layer knows. Tensors go from [batch, sequence] to the
    order of hidden states, and are checked before: errors speak of what the caller has. By default each row is a
    response."""
    validation.check_arguments("output_processor_context", context, function, _FILLED)
    arguments: dict[str, Any] = {
        "tp_group": output_layer.tp_group,
        "sequence_parallel": output_layer.sequence_parallel,
        **context,
    }
    if group_size(arguments["tp_group"]) != group_size(output_layer.tp_group):
        raise ValueError(
            f"tp_group has {group_size(arguments['tp_group'])} ranks, the output layer is split over "
            f"{group_size(output_layer.tp_group)}: leave tp_group out, or pass the layer's"
        )
    targets: Any = arguments.get("targets")
    validation.check_tensors(targets=targets)
    if targets.dim() != 2:
        raise ValueError(
            f"targets has shape {list(targets.shape)}, expected [batch, sequence]; a packed stream is [1, T]"
        )
    ranks = group_size(arguments["tp_group"]) if arguments["sequence_parallel"] else 1
    whole = [hidden_states.shape[1], hidden_states.shape[0] * ranks]
    validation.check_shapes(whole, "[batch, sequence] of the hidden states", targets=targets)
    if "config" not in arguments:
        validation.check_shapes(targets.shape, "that of targets", loss_mask=arguments.get("loss_mask"))
    else:
        check_inputs(
            targets.shape,
            arguments["config"],
            arguments.get("cp_group"),
            loss_mask=arguments["loss_mask"],
            advantages=arguments["advantages"],
            old_logprobs=arguments["old_logprobs"],
            ref_logprobs=arguments.get("ref_logprobs"),
            rollout_logprobs=arguments.get("rollout_logprobs"),
            sequence_ids=arguments.get("sequence_ids"),
        )
        if arguments.get("sequence_ids") is None:
            rows = torch.arange(targets.shape[0], device=targets.device)
            arguments["sequence_ids"] = rows[:, None].expand_as(targets)
    if arguments.get("response_terms") is not None:
        arguments["response_terms"].check(arguments["config"], targets.numel())
        arguments["response_terms"] = arguments["response_terms"].transposed(*targets.shape)
    return {
        name: value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in arguments.items()
    }
