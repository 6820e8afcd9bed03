"""The loss library; needs torch alone.

`policy_loss` and `vocab_parallel_logprobs` serve any pipeline; `megatron_loss_func` is the closure that
Megatron-Core's schedules expect.
"""

from megatron_aspo.config import PolicyLossConfig
from megatron_aspo.loss.logprobs import vocab_parallel_logprobs
from megatron_aspo.loss.megatron import megatron_loss_func
from megatron_aspo.loss.reduction import policy_loss
from megatron_aspo.types import LossOutput

__all__ = ["LossOutput", "PolicyLossConfig", "megatron_loss_func", "policy_loss", "vocab_parallel_logprobs"]
