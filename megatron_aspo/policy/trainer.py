"""The policy that is being trained: model, optimizer, learning-rate schedule, and what is done with them."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_aspo.config import OptimizerConfig, PolicyLossConfig, RunConfig
from megatron_aspo.errors import UserError
from megatron_aspo.loss import (
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    megatron_loss_tuple,
    vocab_parallel_logprobs,
)
from megatron_aspo.packing import pack, unpack
from megatron_aspo.policy.model import build_model, fp8_optimizer_settings, initialize_parallel, model_inputs
from megatron_aspo.policy.router_replay import RouterReplay
from megatron_aspo.types import LossOutput, MicroBatch, Sample

_NEVER_DECAY = 1 << 62
"""The learning rate is constant after its warm-up; the scheduler wants an end that never comes."""


@dataclass
class UpdateMetrics:
    """Sums and counts of one or more updates, local until `reduce`.

    Attributes:
        sums: name -> [2] float64, (sum, count).
        maxima: name -> largest value; `log_ratio_max_first` is that of max |log r| in the first update added, 0 if
            the trainer reproduces its own old log-probs.
        grad_norms: one per update, before clipping.
    """

    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    maxima: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    grad_norms: list[float] = field(default_factory=list[float])

    def add(self, reported: Sequence[dict[str, Any]], grad_norm: float) -> None:
        """Add what `megatron_loss_tuple` returned for the micro-batches of one update."""
        first = not self.grad_norms
        for one in reported:
            for name, pair in one["metrics"].items():
                values = torch.stack([value.double() for value in pair])
                self.sums[name] = self.sums[name] + values if name in self.sums else values
            maxima = dict(one["maxima"])
            if first:
                maxima["log_ratio_max_first"] = maxima["log_ratio_max"]
            for name, value in maxima.items():
                self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value
        self.grad_norms.append(grad_norm)

    def reduce(self) -> dict[str, float]:
        """Means over all tokens of all ranks, the same on every rank: one reduction (and one of the maxima) over
        data- and context-parallel ranks on the last pipeline stage, then handed to the other stages."""
        means: dict[str, float] = {}
        if parallel_state.is_pipeline_last_stage() and self.sums:
            group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
            names, largest = sorted(self.sums), sorted(self.maxima)
            table = torch.stack([self.sums[name] for name in names])
            maxima = torch.stack([self.maxima[name].double() for name in largest])
            dist.all_reduce(table, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            means = {
                name: float(total / count) for name, (total, count) in zip(names, table.tolist(), strict=True) if count
            }
            means |= dict(zip(largest, maxima.tolist(), strict=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            carrier = [means]
            dist.broadcast_object_list(
                carrier,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=_pipeline_group(),
            )
            means = carrier[0]
        if self.grad_norms:
            means["grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
            means["grad_norm_max"] = max(self.grad_norms)
        return means


class Policy:
    """This rank's part of the model with its optimizer; the same calls must be made on every rank, in order."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        initialize_parallel(config.parallel, config.seed)
        self.config = config
        self.vocab_size = vocab_size
        self.model: Any = build_model(config, vocab_size)
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self._router_replay = RouterReplay(self.model)
        self.tp_group: Any = parallel_state.get_tensor_model_parallel_group()
        self.pp_group = _pipeline_group()
        self.cp_group: Any = parallel_state.get_context_parallel_group()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.dp_cp_group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # Ranks that hold the same weights take shares of the requests when responses are sampled: data- and
        # context-parallel ones (decoding is not context-parallel), but not ranks with different experts, which must
        # work in step. Those and tensor-parallel ranks decode the same requests.
        self.rollout_group: Any = parallel_state.get_expert_data_parallel_group()
        self.twin_group: Any = parallel_state.get_expert_tensor_and_model_parallel_group()
        self.is_first_stage = parallel_state.is_pipeline_first_stage()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.previous_stage = parallel_state.get_pipeline_model_parallel_prev_rank()
        self.next_stage = parallel_state.get_pipeline_model_parallel_next_rank()
        self.last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        self.device = next(self.model.parameters()).device
        # Megatron's wrapper of 16-bit models would copy the logits to float32: twice their memory for nothing.
        self._output_dtype = {"fp32_output": False} if self.model.config.bf16 else {}
        self.updates = 0
        self.reset_optimizer(config.optimizer)
        self._reference: list[Tensor] | None = None

    def reset_optimizer(self, config: OptimizerConfig) -> None:
        """A fresh optimizer and learning-rate schedule, as after the supervised warm-up."""
        model = self.config.model
        self.optimizer: Any = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=model.dtype == "bfloat16",
                params_dtype=self.model.config.params_dtype,
                use_distributed_optimizer=True,
                **_offload_settings(config, self.device.type == "cuda"),
                **fp8_optimizer_settings(self.config.fp8),
            ),
            [self.model],
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.lr,
            lr_warmup_steps=config.lr_warmup_updates,
            lr_decay_steps=_NEVER_DECAY,
            lr_decay_style="constant",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.scheduler.step(1)  # the first update has lr / warm-up updates, not 0
        self.updates = 0
        self.release_gradients()

    def pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """This rank's micro-batches of a mini-batch; see `packing.pack`."""
        parallel, train = self.config.parallel, self.config.train
        return pack(
            samples,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            max_tokens=train.max_tokens_per_micro_batch,
            multiple=self.config.stream_multiple,
            context_rank=self.cp_group.rank(),
            context_size=parallel.context,
            one_per_row=not train.packing,
            equal_length=parallel.pipeline > 1,
            device=self.device,
        )

    @torch.no_grad()
    def fill_logprobs(self, batches: Sequence[MicroBatch], name: Literal["old_logprobs", "ref_logprobs"]) -> None:
        """Set `old_logprobs` or `ref_logprobs` of every micro-batch, on the last pipeline stage."""
        weights = self._reference_weights() if name == "ref_logprobs" else contextlib.nullcontext()
        step = partial(self._logprobs_step, name == "old_logprobs")
        with weights:
            results = self._forward_backward(batches, step, forward_only=True)
        if self.is_last_stage:
            for batch, result in zip(batches, results, strict=True):
                setattr(batch, name, result["logprobs"])

    @torch.no_grad()
    def score_responses(self, samples: Sequence[Sample], batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy of every response token by the current weights, the same on every rank.

        Args:
            samples, batches: a mini-batch, and what `pack` made of it: each token is scored by one data- and
                context-parallel rank, and a sum over them brings the table together. With `train.router_replay` later
                calls route the batches as the first one.

        Returns:
            [samples, longest response] each, on the CPU, 0 behind a response's end.
        """
        results = self._forward_backward(batches, self._scoring_step, forward_only=True)
        self._router_replay.stop()
        table = torch.zeros(2, len(samples), max(len(sample.token_ids) for sample in samples), device=self.device)
        if self.is_last_stage:
            for row, name in zip(table, ("logprobs", "entropy"), strict=True):
                row += unpack(samples, batches, [result[name] for result in results])
            dist.all_reduce(table, group=self.dp_cp_group)
        if self.stages > 1:
            dist.broadcast(table, src=self.last_stage, group=self.pp_group)
        logprobs, entropy = table.cpu()
        return logprobs, entropy

    def release_gradients(self) -> None:
        """Free the gradients' buffers until the next `train_step`, if `train.release_gradients`."""
        if self.config.train.release_gradients:
            self.model.offload_grad_buffers()  # freed and not copied, whatever its name says

    def train_step(self, batches: Sequence[MicroBatch], loss: PolicyLossConfig, metrics: UpdateMetrics) -> None:
        """One optimizer update on a mini-batch; adds what it saw to `metrics`."""
        self.model.restore_grad_buffers()  # where they have been released
        self.optimizer.zero_grad()
        self.model.zero_grad_buffer()
        if self.model.config.num_moe_experts:
            router_scale = self._router_loss_scale(batches, loss)
            self.model.config.moe_grad_scale_func = lambda: router_scale
        reported = self._forward_backward(batches, partial(self._loss_step, loss), forward_only=False)
        self._router_replay.stop()
        updated, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm or 0.0):  # a global norm: all ranks stop here
            raise UserError(
                f"the gradient norm of update {self.updates + 1} is {grad_norm}; what has been saved is intact, "
                "continue from it with a lower optimizer.lr"
            )
        if updated:
            self.scheduler.step(1)
            self.updates += 1
        metrics.add(reported, float(grad_norm or 0.0))

    def _router_loss_scale(self, batches: Sequence[MicroBatch], loss: PolicyLossConfig) -> Tensor:
        """What makes the router's losses a mean over tokens. Collective over data- and context-parallel ranks.

        Megatron multiplies them by the tokens of their micro-batch, as if all gradients were to be divided by the
        number of all tokens. They are divided by the policy loss's denominator: response tokens, or responses.
        """
        tokens = sum(batch.tokens.numel() for batch in batches)
        both = torch.stack([self._denominator(batches, loss), torch.tensor(float(tokens), device=self.device)])
        dist.all_reduce(both, group=self.dp_cp_group)
        return both[0].clamp(min=1) / both[1]  # Megatron clamps its divisor too

    def _denominator(self, batches: Sequence[MicroBatch], loss: PolicyLossConfig) -> Tensor:
        """The denominator of `policy_loss`, summed over micro-batches; additive over data- and context-parallel
        ranks."""
        if loss.aggregation == "token-mean":
            return torch.stack([batch.loss_mask.sum() for batch in batches]).sum().float()
        lengths = [batch.loss_mask.new_zeros(len(batch.cu_seqlens), dtype=torch.float32) for batch in batches]
        for count, batch in zip(lengths, batches, strict=True):
            count.index_add_(0, batch.sequence_ids, batch.loss_mask.float())
        every_length = torch.cat(lengths)
        dist.all_reduce(every_length, group=self.cp_group)  # a response may have tokens on several ranks
        return (every_length > 0).sum() / self.cp_group.size()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def keep_reference(self) -> None:
        """Make the current weights the reference policy of the KL term."""
        self._reference = [parameter.detach().clone().cpu() for parameter in self.model.parameters()]

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The reference policy's weights in place of the current ones."""
        assert self._reference is not None, "keep_reference was not called"
        current = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._assign(self._reference)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(weight)

    def _forward_backward(self, batches: Sequence[MicroBatch], step: Any, forward_only: bool) -> list[dict[str, Any]]:
        self.model.train(not forward_only)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel() * self.config.parallel.context,  # Megatron divides by it again
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _loss_step(self, loss: PolicyLossConfig, batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        arguments = {
            **self._head_arguments(batch),
            "old_logprobs": _row(batch.old_logprobs),
            "advantages": _row(batch.advantages),
            "config": loss,
            "cp_group": self.cp_group,
            "ref_logprobs": _row(batch.ref_logprobs),
            "rollout_logprobs": _row(batch.rollout_logprobs),
            "sequence_ids": _row(batch.sequence_ids),
        }
        self._router_replay.replay(batch)
        if self.config.train.fused_head:
            output, loss_func = self._run_with_head(model, batch, megatron_loss_head, arguments), megatron_loss_tuple
        else:
            output = model(**model_inputs(batch), **self._output_dtype)
            loss_func = partial(megatron_loss_func, **arguments)
        self._router_replay.replay_in_backward(batch, output.loss_sum if isinstance(output, LossOutput) else output)
        return output, loss_func

    def _logprobs_step(self, record: bool, batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        if record:
            with self._router_replay.record(batch):
                return self._logprobs_of(batch, model)
        return self._logprobs_of(batch, model)

    def _scoring_step(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        if batch.routing is None:
            with self._router_replay.record(batch):
                return self._logprobs_of(batch, model, with_entropy=True)
        self._router_replay.replay(batch)
        return self._logprobs_of(batch, model, with_entropy=True)

    def _logprobs_of(self, batch: MicroBatch, model: Any, with_entropy: bool = False) -> tuple[Any, Any]:
        arguments = self._head_arguments(batch)

        def found(both: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            values = {name: one[0] for name, one in zip(("logprobs", "entropy"), both, strict=True) if one is not None}
            return both[0].new_zeros(()), batch.loss_mask.sum().int(), values

        def from_logits(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return found(vocab_parallel_logprobs(logits, with_entropy=with_entropy, **arguments))

        if self.config.train.fused_head:
            return self._run_with_head(model, batch, megatron_logprobs_head, arguments), found
        return model(**model_inputs(batch), **self._output_dtype), from_logits

    def _head_arguments(self, batch: MicroBatch) -> dict[str, Any]:
        """What log-probs are made from, in Megatron's order [batch, sequence]."""
        return {
            "targets": _row(batch.labels),
            "loss_mask": _row(batch.loss_mask),
            "tp_group": self.tp_group,
            "temperature": self.config.rollout.temperature,
            "vocab_size": self.vocab_size,  # the padding beyond has no probability
        }

    def _run_with_head(self, model: Any, batch: MicroBatch, head: Any, arguments: dict[str, Any]) -> Any:
        """The model with `head` in the place of its output layer, on the last stage."""
        return model(
            **model_inputs(batch), **self._output_dtype, output_processor=head, output_processor_context=arguments
        )


def _offload_settings(config: OptimizerConfig, on_gpu: bool) -> dict[str, Any]:
    """Megatron's settings for optimizer states that are not float32 on the GPU; none if they are.

    Megatron keeps a second float32 copy of the weights on the GPU unless the optimizer is "precision-aware".
    """
    if config.cpu_offload:
        if not on_gpu:
            raise UserError(
                f"optimizer.cpu_offload={config.cpu_offload} needs a GPU to offload from; set optimizer.cpu_offload=0"
            )
        return {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": config.cpu_offload,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    if config.moments_dtype == "bfloat16":
        if importlib.util.find_spec("transformer_engine") is None:
            raise UserError(
                "optimizer.moments_dtype=bfloat16 needs Transformer Engine's optimizer, which is not installed; set "
                "optimizer.moments_dtype=float32"
            )
        moments = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
        return {"use_precision_aware_optimizer": True} | moments
    return {}


def _pipeline_group() -> Any:
    return parallel_state.get_pipeline_model_parallel_group()


def _row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values[None]
