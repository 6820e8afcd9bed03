"""A complete ASPO step over Megatron-Core's schedule, to copy from: old log-probs of rollouts, then several updates.

    torchrun --nproc-per-node 4 examples/integrations/megatron_lm/train_loop.py --tensor 2 --pipeline 2

Replace GPTModel, rollouts and rewards by yours. Without GPUs it runs over gloo. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_lm_aspo import forward_step
from torch import Tensor

from megatron_aspo.loss import PolicyLossConfig, megatron_forward, megatron_logprobs_head

VOCAB, PROMPT, LENGTH, MICRO_BATCH = 64, 4, 24, 2


def existing_model(config: TransformerConfig) -> GPTModel:
    """A stand-in for your model, without any trace of ASPO."""
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def rollouts(micro_batches: int) -> list[dict[str, Tensor]]:
    """A stand-in for your sampler and rewards: dicts of [batch, sequence], one entry per label."""
    draw = torch.Generator().manual_seed(0)
    batches: list[dict[str, Tensor]] = []
    for _ in range(micro_batches):
        tokens = torch.randint(VOCAB, (MICRO_BATCH, LENGTH), generator=draw)
        rewards = (tokens[:, PROMPT:] % 2).float().mean(1)
        mask = torch.arange(1, LENGTH + 1) >= PROMPT  # which labels the policy wrote
        mask[-1] = False  # no label
        batches.append(
            {
                "tokens": tokens,
                "position_ids": torch.arange(LENGTH).expand(MICRO_BATCH, LENGTH),
                "targets": tokens.roll(-1, 1),
                "advantages": (rewards - 0.5)[:, None].repeat(1, LENGTH),
                "loss_mask": mask.expand(MICRO_BATCH, LENGTH),
            }
        )
    return batches


def score_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Any, Any]:
    """A forward step that returns log-probs, without logits."""
    batch = next(data_iterator)
    context = {"targets": batch["targets"], "loss_mask": batch["loss_mask"]}
    inputs = batch["tokens"], batch["position_ids"], None
    output = megatron_forward(model, *inputs, head=megatron_logprobs_head, context=context)
    return output, lambda values, non_loss_data: values[0]


def train(parsed: argparse.Namespace) -> list[dict[str, float]]:
    """The metrics of each update, on the ranks of the last pipeline stage."""
    seed = 1 + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        tensor_model_parallel_size=parsed.tensor,
        pipeline_model_parallel_size=parsed.pipeline,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # the mean is over all tokens of all micro-batches and ranks
        finalize_model_grads_func=finalize_model_grads,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, whole, existing_model(config).to(device))
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=2e-3, weight_decay=0.0), [model])
    config.grad_scale_func = optimizer.scale_loss

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [
        {name: value.to(device) for name, value in batch.items()}
        for batch in rollouts(parsed.micro_batches)[rank::ranks]
    ]
    schedule = partial(
        get_forward_backward_func(),
        model=[model],
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
    )

    with torch.no_grad():  # of the policy before the first update; they lie on the last stage, where the loss is
        old_logprobs: Sequence[Tensor] = schedule(
            forward_step_func=score_step, data_iterator=iter(batches), forward_only=True, collect_non_loss_data=True
        )
    for batch, logprobs in zip(batches, old_logprobs, strict=False):  # other stages get none and need none
        batch["old_logprobs"] = logprobs

    history = []
    step = partial(forward_step, config=PolicyLossConfig(objective="aspo"))
    for _ in range(parsed.updates):  # ASPO differs from GRPO from the second one on
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reported = schedule(forward_step_func=step, data_iterator=iter(batches), forward_only=False)
        optimizer.step()
        if parallel_state.is_pipeline_last_stage():
            pairs = torch.stack([torch.stack(list(one.values())) for one in reported]).sum(0)
            dist.all_reduce(pairs, group=parallel_state.get_data_parallel_group())
            history.append(dict(zip(reported[0], (pairs[:, 0] / pairs[:, 1]).tolist(), strict=True)))
    return history


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--updates", type=int, default=4)
    parsed = parser.parse_args(arguments)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        parallel_state.initialize_model_parallel(parsed.tensor, parsed.pipeline)
    else:  # Megatron-Core needs a GPU; this also replaces what it calls of CUDA
        from megatron_aspo.config.model import ParallelConfig
        from megatron_aspo.policy.parallel import initialize_parallel

        initialize_parallel(ParallelConfig(tensor=parsed.tensor, pipeline=parsed.pipeline), seed=1)
    history = train(parsed)
    first = parallel_state.get_tensor_model_parallel_rank() == 0 == parallel_state.get_data_parallel_rank()
    if history and first:
        for update, metrics in enumerate(history):
            print(
                json.dumps({"update": update, **{name: round(value, 4) for name, value in metrics.items()}}), flush=True
            )
    dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
