"""The policy loss; needs torch alone.

`fused_linear_policy_loss` goes from hidden states to loss and gradients without logits. If logits exist already,
`vocab_parallel_logprobs` and `policy_loss` compute the same in two steps. The `megatron_*` functions have the forms
that Megatron-Core takes. `TokenBatch` describes the tensors that they share.
"""

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.loss.fused_linear import fused_linear_logprobs, fused_linear_policy_loss
from megatron_aspo.loss.logprobs import vocab_parallel_logprobs
from megatron_aspo.loss.megatron import (
    megatron_forward,
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    megatron_loss_tuple,
)
from megatron_aspo.loss.objectives import Objective, TokenInputs, TokenTerms
from megatron_aspo.loss.policy_loss import policy_loss
from megatron_aspo.loss.token_loss import LossOutput
from megatron_aspo.loss.tokens import TokenBatch

__all__ = [
    "LossOutput",
    "Objective",
    "PolicyLossConfig",
    "TokenBatch",
    "TokenInputs",
    "TokenTerms",
    "fused_linear_logprobs",
    "fused_linear_policy_loss",
    "megatron_forward",
    "megatron_logprobs_head",
    "megatron_loss_func",
    "megatron_loss_head",
    "megatron_loss_tuple",
    "policy_loss",
    "vocab_parallel_logprobs",
]
