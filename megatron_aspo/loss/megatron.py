"""The loss in the forms that Megatron-Core takes; does not import Megatron."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss import validation
from megatron_aspo.loss.collectives import group_size
from megatron_aspo.loss.fused_linear import fused_linear_logprobs, fused_linear_policy_loss
from megatron_aspo.loss.logprobs import vocab_parallel_logprobs
from megatron_aspo.loss.policy_loss import policy_loss
from megatron_aspo.loss.token_loss import LossOutput
from megatron_aspo.loss.tokens import TokenBatch, transposed_positions

LossTuple = tuple[Tensor, Tensor, dict[str, Any]]
"""(loss_sum, denominator as int32, {"metrics": name -> (sum, count), "maxima": name -> scalar})."""


def megatron_loss_func(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor,
    *,
    config: PolicyLossConfig,
    tp_group: dist.ProcessGroup | None,
    cp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    positions: Tensor | None = None,
    **tokens: Any,
) -> LossTuple:
    """The policy loss in the form that Megatron-Core's schedules take from a forward step.

    Use it as `return model(...), partial(megatron_loss_func, targets=..., ...)` with
    `calculate_per_token_loss=True`: the schedule sums the results over micro-batches, and
    `finalize_model_grads` divides the gradients by the denominator summed over data- and context-parallel
    ranks. Nothing here is scaled by ranks or micro-batches, and the gradient is the same in every layout.

    Args:
        logits: [..., V/tp], the model's parallel output.
        targets, loss_mask, positions, tokens: the fields of `TokenBatch`, [...] each; a micro-batch may be empty.
        tp_group, temperature, vocab_size: as in `vocab_parallel_logprobs`.
        cp_group: as in `policy_loss`.
    """
    logprobs, entropy = vocab_parallel_logprobs(
        logits, targets, tp_group, temperature, vocab_size, loss_mask, positions
    )
    out = policy_loss(logprobs, loss_mask=loss_mask, config=config, entropy=entropy, cp_group=cp_group, **tokens)
    return megatron_loss_tuple(out)


def megatron_loss_tuple(output: LossOutput) -> LossTuple:
    """The loss function, for Megatron-Core's schedules, of a model with `megatron_loss_head`."""
    return output.loss_sum, output.denominator.int(), {"metrics": output.metrics, "maxima": output.maxima}


def megatron_forward(model: Any, *args: Any, head: Any, context: dict[str, Any], **kwargs: Any) -> Any:
    """Call a GPTModel with a head in place of its output layer: with any Megatron-Core from 0.14 to 0.19.

    From 0.18 on, the head is GPTModel's `output_processor`. Before, `output_layer.forward` is replaced for this call.
    Neither the model's parameters nor its state_dict change. In a forward step, with `calculate_per_token_loss=True`::

        output = megatron_forward(model, tokens, positions, None, head=megatron_loss_head,
                                  context={"targets": labels, "old_logprobs": old, ...})
        return output, megatron_loss_tuple

    Args:
        model: a GPTModel, bare or in wrappers such as Float16Module and DistributedDataParallel.
        args, kwargs: the model's own arguments, without labels.
        head: `megatron_loss_head` or `megatron_logprobs_head`. `context`: their keyword arguments.

    Returns:
        The head's result; on a pipeline stage before the last one the model's output.

    Raises:
        ValueError: the model has no output layer to replace, or gets labels; or as the head raises.
    """
    gpt = model
    while hasattr(gpt, "module"):
        gpt = gpt.module
    signature = inspect.signature(gpt.forward)
    takes_head = "output_processor" in signature.parameters
    is_last_stage = getattr(gpt, "post_process", True)
    has_labels = signature.bind_partial(*args, **kwargs).arguments.get("labels") is not None
    if is_last_stage and (has_labels or not (takes_head or hasattr(gpt, "output_layer"))):
        raise ValueError(f"megatron_forward needs a GPTModel and no labels; the model is a {type(gpt).__name__}")
    if takes_head:
        return model(*args, output_processor=head, output_processor_context=context, **kwargs)
    if not is_last_stage:
        return model(*args, **kwargs)
    _refuse_mtp(gpt.config)  # before GPTModel computes its loss
    lent: Any = gpt.output_layer
    layer = copy.copy(lent)  # same weight; without the hooks that the layer's own call has run by then
    layer._forward_pre_hooks = {}

    def forward(hidden_states: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[_Carrier, None]:
        result = head(
            hidden_states=hidden_states, output_layer=layer, output_weight=weight, config=gpt.config, context=context
        )
        return _Carrier(result), None

    of_others: Any = lent.__dict__.get("forward")  # a library's replacement
    lent.forward = forward
    try:
        return model(*args, **kwargs).result
    finally:
        if of_others is None:
            del lent.forward
        else:
            lent.forward = of_others


@dataclass(frozen=True)
class _Carrier:
    """A head's result in the place of logits: GPTModel returns `logits.transpose(0, 1).contiguous()`."""

    result: Any

    def transpose(self, *_: int) -> _Carrier:
        return self

    def contiguous(self) -> _Carrier:
        return self


def megatron_loss_head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, context: Any, **_: Any
) -> LossOutput:
    """The fused head as GPTModel's `output_processor`, which replaces its output layer; see `megatron_forward`.

    No logits are computed. The gradient of the output weight goes to its `main_grad` during the forward pass: evaluate
    under `torch.no_grad()`.

    Args:
        context: the keyword arguments of `fused_linear_policy_loss`, tensors in Megatron's order [batch, sequence].
            The head fills in hidden, weight, tp_group, sequence_parallel and loss_scale. By default each row is a
            response.
        hidden_states: [sequence, batch, H], with sequence parallelism this rank's 1/tp of the sequence.
        output_layer, output_weight, config: as GPTModel passes them.

    Raises:
        TypeError: the context has an unknown name or lacks one (KeyError for `config`).
        ValueError: shapes, types, ids, groups or numbers do not fit; the model has a feature that the head does not
            support. Raised before any collective.
    """
    if not config.calculate_per_token_loss:
        raise ValueError("megatron_loss_head needs calculate_per_token_loss=True in Megatron's TransformerConfig")
    options = dict(context)
    tokens = TokenBatch(**{f.name: options.pop(f.name) for f in fields(TokenBatch) if f.name in options})
    targets: Any = tokens.targets
    options |= _options(output_layer, hidden_states, targets)
    tokens.check(targets.shape, options["config"], options.get("cp_group"))
    scale = config.grad_scale_func
    options["loss_scale"] = 1.0 if scale is None else scale(torch.ones((), device=hidden_states.device))
    weight = _weight(output_layer, output_weight, config)
    output = fused_linear_policy_loss(hidden_states, weight, **vars(tokens.transposed()), **options)
    assert output.entropy is not None  # the fused head always computes it
    return replace(output, logprobs=output.logprobs.transpose(0, 1), entropy=output.entropy.transpose(0, 1))


def megatron_logprobs_head(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, context: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [batch, sequence] without gradient as GPTModel's `output_processor`: for old and reference
    policies. `context` has the keyword arguments of `fused_linear_logprobs`; see `megatron_loss_head`."""
    options = dict(context)
    targets, mask, positions = (options.pop(name, None) for name in ("targets", "loss_mask", "positions"))
    options |= _options(output_layer, hidden_states, targets)
    validation.check_shapes(targets.shape, "that of targets", loss_mask=mask)
    validation.check_positions(positions, targets.numel())
    options["loss_mask"] = None if mask is None else mask.transpose(0, 1)
    options["positions"] = transposed_positions(positions, *targets.shape)
    weight = _weight(output_layer, output_weight, config)
    logprobs, entropy = fused_linear_logprobs(hidden_states, weight, targets.transpose(0, 1), **options)
    return logprobs.transpose(0, 1), entropy.transpose(0, 1)


def _options(output_layer: Any, hidden_states: Tensor, targets: Any) -> dict[str, Any]:
    """The layer's own options, after a check that targets are [batch, sequence]."""
    validation.check_tensors(targets=targets)
    tp_group, sequence_parallel = output_layer.tp_group, output_layer.sequence_parallel
    rows = hidden_states.shape[0] * (group_size(tp_group) if sequence_parallel else 1)
    reason = "[batch, sequence] of the hidden states; a packed stream is [1, T]"
    validation.check_shapes([hidden_states.shape[1], rows], reason, targets=targets)
    return {"tp_group": tp_group, "sequence_parallel": sequence_parallel}


def _weight(output_layer: Any, output_weight: Tensor | None, config: Any) -> Tensor:
    """The output layer's weight, which may be the embedding's."""
    if getattr(config, "use_mup", False) or output_layer.bias is not None:
        raise ValueError("the fused head supports neither muP's scaled logits nor a bias of the output layer")
    _refuse_mtp(config)
    # Hooks of the layer's call must run before its weight is read: Megatron waits there for parameters that
    # are being gathered (overlap_param_gather).
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    return output_layer.weight if output_weight is None else output_weight


def _refuse_mtp(config: Any) -> None:
    """Its gradient in the output weight would be lost beside the one in main_grad."""
    if getattr(config, "mtp_num_layers", None):
        raise ValueError("the fused head does not support multi-token prediction (mtp_num_layers)")
