"""The policy in training: model, optimizer, learning-rate schedule and the update."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_aspo.batch import MicroBatch, Sample
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.errors import RunError
from megatron_aspo.loss import (
    megatron_logprobs_head,
    megatron_loss_func,
    megatron_loss_head,
    megatron_loss_tuple,
    vocab_parallel_logprobs,
)
from megatron_aspo.loss.token_loss import LossOutput
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.model import build_model, model_inputs
from megatron_aspo.policy.optimizer import build_optimizer
from megatron_aspo.policy.packing import forget_streams, pack
from megatron_aspo.policy.parallel import Place, initialize_parallel
from megatron_aspo.policy.reference import ReferenceWeights
from megatron_aspo.policy.router_replay import RouterReplay
from megatron_aspo.ranks.exchange import deliver
from megatron_aspo.ranks.gathering import gather_objects
from megatron_aspo.ranks.process_group import warn


class Policy:
    """This rank's part of the model with its optimizer. Every rank must make the same calls in the same order.

    Attributes:
        chunks: this rank's part of the model, one for each virtual pipeline stage.
        weight_version: optimizer updates that the weights have taken.
        rollout_group: ranks that hold the same weights and share the requests when responses are sampled: data- and
            context-parallel ones (decoding is not context-parallel).
        twin_group: ranks that decode the same requests: tensor-parallel ones, and those with different experts, which
            communicate in every layer.
    """

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        initialize_parallel(config.parallel, config.init_seed)
        self.config = config
        self.vocab_size = vocab_size
        self.chunks: list[Any] = build_model(config, vocab_size)
        self.transformer = self.chunks[0].config
        self.transformer.finalize_model_grads_func = finalize_model_grads
        self.device = next(self.parameters()).device
        self._router_replay = RouterReplay(self.chunks)
        modules: list[Any] = [module for chunk in self.chunks for module in chunk.modules()]
        self._attentions = [module.core_attention for module in modules if hasattr(module, "core_attention")]
        self._blocks = [module for module in modules if hasattr(module, "input_tensor")]
        dispatchers = [module.token_dispatcher for module in modules if hasattr(module, "token_dispatcher")]
        self._dispatchers = dispatchers + [d._comm_manager for d in dispatchers if hasattr(d, "_comm_manager")]
        # Megatron's wrapper of 16-bit models would copy the logits to float32: twice their memory for nothing.
        self._output_dtype = {"fp32_output": False} if self.transformer.bf16 else {}
        self._reference: ReferenceWeights | None = None
        self.reset_optimizer(config.optimizer)

        self.tp_group: Any = parallel_state.get_tensor_model_parallel_group()
        self.pp_group: Any = parallel_state.get_pipeline_model_parallel_group()
        self.cp_group: Any = parallel_state.get_context_parallel_group()
        self.dp_cp_group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.rollout_group: Any = parallel_state.get_expert_data_parallel_group()
        self.twin_group: Any = parallel_state.get_expert_tensor_and_model_parallel_group()
        self.is_first_stage = parallel_state.is_pipeline_first_stage()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.previous_stage = parallel_state.get_pipeline_model_parallel_prev_rank()
        self.next_stage = parallel_state.get_pipeline_model_parallel_next_rank()
        self.last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
        self.dp_rank: int = parallel_state.get_data_parallel_rank()
        place = Place(self.dp_rank, self.rollout_group.rank(), tuple(self._router_replay.layers))
        self.places: list[Place] = gather_objects(place)

    def reset_optimizer(self, config: OptimizerConfig, decay_updates: int | None = None) -> None:
        """Start with a new optimizer and learning-rate schedule, as after the supervised warm-up. `decay_updates` is
        that of `build_optimizer`."""
        self.optimizer, self.scheduler = build_optimizer(self.chunks, config, self.config.fp8, decay_updates)
        self.weight_version = 0
        self._skipped_in_a_row = 0
        self.release_gradients()

    @property
    def model(self) -> Any:
        """The only chunk of a policy without virtual pipeline stages."""
        (model,) = self.chunks
        return model

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of all chunks, in order. See `whole_chunks`."""
        return itertools.chain.from_iterable(chunk.parameters() for chunk in self.chunks)

    @torch.no_grad()
    def whole_chunks(self) -> list[Any]:
        """`chunks` with the weights of the last update, to read them otherwise than by a forward pass. Collective.

        With `parallel.overlap_param_gather` an update leaves the other data-parallel ranks' share of the weights out
        of date until the next forward pass.
        """
        for chunk in self.chunks if self.config.parallel.overlap_param_gather else []:
            chunk.start_param_sync(force_sync=True)
        return self.chunks

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """This rank's micro-batches of a mini-batch; see `packing.pack`. Collective: brings the arrays of the samples
        that this rank trains on from their owners."""
        train, parallel, tp = self.config.train, self.config.parallel, self.tp_group
        from_sampler = train.router_replay == "sampler"
        return pack(
            samples,
            deliver=self._deliver,
            dp_rank=self.dp_rank,
            dp_size=parallel_state.get_data_parallel_world_size(),
            max_tokens=train.max_tokens_per_micro_batch,
            multiple=self.config.stream_multiple,
            context_rank=self.cp_group.rank(),
            context_size=self.cp_group.size(),
            one_per_row=not train.packing,
            equal_length=parallel.equal_streams,
            rounds=parallel.rounds,
            vocab_size=self.vocab_size,
            experts=self.transformer.num_moe_experts if from_sampler else 0,
            sequence_rank=tp.rank() if self.config.parallel.sequence_parallel else 0,
            sequence_size=tp.size() if self.config.parallel.sequence_parallel else 1,
            device=self.device,
        )

    def _deliver(self, samples: Sequence[Sample], dp_ranks: Sequence[int]) -> list[Sample]:
        """The samples with the arrays of those of this rank's replica, whose ranks have `dp_ranks` in common."""
        readers: dict[int, list[int]] = defaultdict(list)
        for rank, place in enumerate(self.places):
            readers[place.dp_rank].append(rank)
        layers = [place.routed_layers for place in self.places]
        return deliver(samples, [readers[dp_rank] for dp_rank in dp_ranks], layers)

    def keep_reference(self) -> None:
        """Make the current weights the reference policy of the KL term."""
        self._reference = ReferenceWeights(self.whole_chunks())

    def reference_weights(self) -> AbstractContextManager[None]:
        """Exchange the policy's weights for the reference's; one exchange should span all mini-batches of a step."""
        assert self._reference is not None, "keep_reference was not called"
        self.whole_chunks()
        return self._reference.exchanged()

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch], *, entropy: bool = False) -> list[Tensor]:
        """Log-probs of the labels of every micro-batch, in nats, without gradients. Collective.

        With `train.router_replay` the first call for a micro-batch records its routing, unless it came with the
        sampler's, and later calls and updates replay that. The reference policy, within `reference_weights`, routes
        freely.

        Returns:
            One tensor per micro-batch on the last pipeline stage, [T / context], or with `entropy` [2, T / context],
            log-probs first. An empty list on the other stages.
        """
        return self._forward_backward(batches, partial(self._logprobs_step, entropy), forward_only=True)

    def release_gradients(self) -> None:
        """Free the gradients' buffers until the next `train_step`, if `train.release_gradients`."""
        if self.config.train.release_gradients:
            for chunk in self.chunks:
                chunk.offload_grad_buffers()  # frees them without a copy, despite its name

    def train_step(self, batches: Sequence[MicroBatch], loss: PolicyLossConfig, metrics: UpdateMetrics) -> None:
        """Take one optimizer update on a mini-batch and add it to `metrics`.

        An update whose gradient is not finite is skipped: weights, moments, learning rate and `weight_version` stay.

        Raises:
            RunError: `optimizer.max_skipped_updates` updates in a row were skipped.
        """
        for chunk in self.chunks:
            chunk.restore_grad_buffers()  # if they have been released
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.transformer.num_moe_experts:
            router_scale = self._router_loss_scale(batches, loss)
            self.transformer.moe_grad_scale_func = lambda: router_scale
        reported = self._forward_backward(batches, partial(self._loss_step, loss), forward_only=False)
        self._router_replay.stop()
        if not self._gradients_are_finite():
            metrics.skipped += 1
            self._skipped_in_a_row += 1
            self._report_skipped()
            return
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(1)
        self.weight_version += 1
        self._skipped_in_a_row = 0
        metrics.add(reported, float(grad_norm))

    def _gradients_are_finite(self) -> bool:
        """Whether every gradient of every rank is finite; the same on all ranks. Collective over all of them.

        Megatron's norm cannot decide it: it leaves out what tensor-parallel ranks hold in common.
        """
        buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        norm = torch.stack([torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers]).sum()
        dist.all_reduce(norm)
        return math.isfinite(norm.item())

    def _report_skipped(self) -> None:
        limit = self.config.optimizer.max_skipped_updates
        if self._skipped_in_a_row >= limit:
            raise RunError(
                f"the gradients of {limit} updates in a row are not finite (optimizer.max_skipped_updates={limit}); "
                "lower optimizer.lr if it happens again"
            )
        warn(
            f"update {self.weight_version + 1} is skipped: its gradient is not finite; "
            f"optimizer.max_skipped_updates={limit} in a row end the run"
        )

    def _router_loss_scale(self, batches: Sequence[MicroBatch], loss: PolicyLossConfig) -> Tensor:
        """Factor that makes the router's losses a mean over tokens. Collective over data- and context-parallel ranks.

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
            return torch.tensor(float(sum(len(batch.loss_positions) for batch in batches)), device=self.device)
        lengths = [batch.loss_mask.new_zeros(len(batch.cu_seqlens), dtype=torch.float32) for batch in batches]
        for count, batch in zip(lengths, batches, strict=True):
            count.index_add_(0, batch.sequence_ids, batch.loss_mask.float())
        every_length = torch.cat(lengths)
        dist.all_reduce(every_length, group=self.cp_group)  # a response may have tokens on several ranks
        return (every_length > 0).sum() / self.cp_group.size()

    def _forward_backward(self, batches: Sequence[MicroBatch], step: Any, forward_only: bool) -> list[Any]:
        for chunk in self.chunks:
            chunk.train(not forward_only)
        # cuDNN may have another plan for inference, which rounds differently; there is no dropout.
        for attention in self._attentions:
            attention.train()
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel() * self.config.parallel.context,  # Megatron divides by it again
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        # Megatron's dispatchers keep the last pass's probabilities and permutation. Under full recomputation the graph
        # behind the probabilities holds every layer's input and its gradient.
        for dispatcher in self._dispatchers:
            vars(dispatcher).update(dict.fromkeys(_LAST_PASS & vars(dispatcher).keys()))
        for block in self._blocks:  # a later stage's last input, with its gradient
            block.input_tensor = None
        forget_streams()
        return results

    def _loss_step(self, loss: PolicyLossConfig, batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        arguments = self._head_arguments(batch) | {"config": loss, "cp_group": self.cp_group}
        for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "sequence_ids"):
            arguments[name] = _row(getattr(batch, name))
        self._router_replay.replay(batch)
        if self.config.train.fused_head:
            output, loss_func = self._run(model, batch, megatron_loss_head, arguments), megatron_loss_tuple
        else:
            output, loss_func = self._run(model, batch), partial(megatron_loss_func, **arguments)
        self._router_replay.replay_in_backward(batch, output.loss_sum if isinstance(output, LossOutput) else output)
        return output, loss_func

    def _logprobs_step(self, entropy: bool, batches: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
        batch = next(batches)
        arguments = self._head_arguments(batch)

        def from_head(values: Tensor, non_loss_data: bool) -> Tensor:
            return values if entropy else values[0]

        def from_logits(logits: Tensor, non_loss_data: bool) -> Tensor:
            logprobs, entropies = vocab_parallel_logprobs(logits, **arguments)
            return torch.cat([logprobs, entropies]) if entropy else logprobs[0]

        is_reference = self._reference is not None and self._reference.in_place
        with contextlib.nullcontext() if is_reference else self._router_replay.record_or_replay(batch, model):
            if self.config.train.fused_head:
                return self._run(model, batch, _stacked_logprobs_head, arguments), from_head
            return self._run(model, batch), from_logits

    def _head_arguments(self, batch: MicroBatch) -> dict[str, Any]:
        """Arguments of log-probs, tensors in Megatron's order [batch, sequence]."""
        return {
            "targets": _row(batch.labels),
            "loss_mask": _row(batch.loss_mask),
            "positions": batch.loss_positions,
            "tp_group": self.tp_group,
            "temperature": self.config.rollout.temperature,
            "vocab_size": self.vocab_size,  # the padding beyond has no probability
        }

    def _run(self, model: Any, batch: MicroBatch, head: Any = None, arguments: dict[str, Any] | None = None) -> Any:
        """The model's output; a `head` replaces the output layer on the last stage."""
        processor = {"output_processor": head, "output_processor_context": arguments} if head else {}
        return model(**model_inputs(batch), **self._output_dtype, **processor)


_LAST_PASS = {"probs", "routing_map", "reversed_local_input_permutation_mapping", "token_probs", "dispatched_probs"}


def _stacked_logprobs_head(**arguments: Any) -> Tensor:
    """[2, T], log-probs and entropy; Megatron's schedules require a tensor."""
    return torch.cat(megatron_logprobs_head(**arguments))


def _row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values[None]
