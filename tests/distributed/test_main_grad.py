"""The fused head with Megatron's gradient buffer: accumulation, overlapped communication, loss scale."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heads import DTYPES, SHARD, TOKENS, WIDTH, Place, head_loss, random_inputs
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from oracle import Batch, make_batch, reference
from ranks import VOCAB, make_samples, run, run_config
from torch import Tensor

from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.training import OptimizerConfig
from megatron_aspo.loss import LossOutput, fused_linear_policy_loss
from megatron_aspo.policy import model, trainer
from megatron_aspo.policy.architecture import Architecture
from megatron_aspo.policy.metrics import UpdateMetrics
from megatron_aspo.policy.model import transformer_config
from megatron_aspo.policy.parallel import initialize_parallel
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.train import set_logprobs

pytestmark = pytest.mark.distributed

MICRO_BATCHES = [(True, 1.0), (False, -2.0), (True, -0.5)]
"""(packed, factor of the advantages)"""


def micro_batches(tied: bool, dtype: torch.dtype, dp_rank: int) -> list[Batch]:
    batches: list[Batch] = []
    for packed, factor in MICRO_BATCHES:
        batch = make_batch(packed, tied, dtype)
        advantages = batch.data["advantages"] * factor * (1 - 3 * dp_rank)
        batches.append(replace(batch, data={**batch.data, "advantages": advantages}))
    return batches


class Output(torch.nn.Module):
    """An output layer; if tied, it shares its weight with the embedding."""

    def __init__(self, weight: Tensor, tied: bool) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(weight)
        if tied:
            self.weight.zero_out_wgrad = True  # as GPTModel sets it

    def forward(self, place: Place, batch: Batch, config: PolicyLossConfig) -> LossOutput:
        base = place.part(batch.base, batch).requires_grad_()
        return head_loss(place, batch, config, base, self.weight)


def accumulate(overlap: bool) -> list[tuple[Any, float, bool]]:
    """For each case: its name, the error of main_grad, and whether the weight is unchanged. At TP = 2, DP = 2."""
    config = run_config(ParallelConfig(tensor=2))
    results: list[tuple[Any, float, bool]] = []
    with distributed(config):
        initialize_parallel(config.parallel, 0)
        place = Place(1, 1)
        place.tp, place.tp_group = 2, parallel_state.get_tensor_model_parallel_group()
        place.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        dp_rank = parallel_state.get_data_parallel_rank()
        loss = PolicyLossConfig(kl_coef=0.1)
        for dtype in DTYPES:
            for tied in (False, True):
                batches = micro_batches(tied, dtype, dp_rank)
                layer = Output(place.shard(batches[0].weight), tied)
                before = layer.weight.detach().clone()
                ddp = DistributedDataParallel(
                    transformer_config(config, Architecture.from_config(config.model)),
                    DistributedDataParallelConfig(
                        grad_reduce_in_fp32=dtype != torch.float64, overlap_grad_reduce=overlap
                    ),
                    layer,
                    pg_collection=None,
                )
                ddp.zero_grad_buffer()
                with ddp.no_sync():
                    for batch in batches[:-1]:
                        ddp(place, batch, loss).loss_sum.backward()
                ddp(place, batches[-1], loss).loss_sum.backward()
                ddp.finish_grad_sync()
                assert layer.weight.grad is None
                expected = torch.zeros_like(batches[0].weight, dtype=torch.float64)
                for replica in range(2):
                    for batch in micro_batches(tied, dtype, replica):
                        assert torch.equal(batch.weight, batches[0].weight)
                        expected += reference(batch, loss).grad_weight
                difference = layer.weight.main_grad.double() - place.shard(expected)
                same = torch.equal(layer.weight.detach(), before)
                results.append(((dtype, tied), float(difference.norm() / expected.norm()), same))
    return results


@pytest.mark.parametrize("overlap", [False, True])
def test_megatrons_buffer_holds_the_sum_of_the_gradients_of_all_micro_batches(overlap: bool) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02}
    for results in run(4, accumulate, overlap):
        assert len(results) == 2 * len(DTYPES)
        for (dtype, tied), difference, same in results:
            assert difference < tolerance[dtype], (dtype, tied)
            assert same, (dtype, tied)


def train_while_parameters_are_gathered(fused: bool, overlap: bool, tied: bool) -> list[tuple[float, ...]]:
    """(value, nll, gradient norm, largest log ratio) of three updates at DP = 2. With `overlap` parameters keep
    their old values until a hook waits for them, as on a slow network."""
    gathered: list[int] = []

    def start_late(group: Any, force_sync: bool = False) -> None:
        assert group.param_gather_handle is None

        class Handle:
            def wait(self) -> None:
                ranks = group.intra_distributed_optimizer_instance_group
                for bucket in group.buckets:
                    own = bucket.param_data.view(-1).chunk(ranks.size())[ranks.rank()].clone()
                    dist.all_gather_single(bucket.param_data.view(-1), own, group=ranks)
                gathered.append(id(group))

        group.param_gather_handle = Handle()
        group.param_gather_dispatched = True
        if force_sync:
            group.param_gather_handle.wait()
            group.param_gather_handle = None

    if overlap:  # in a separate process
        ddp_config = model.DistributedDataParallelConfig
        more: dict[str, Any] = {"bucket_size": 3000}
        patch = pytest.MonkeyPatch()
        patch.setattr(model, "DistributedDataParallelConfig", partial(ddp_config, **more))
        patch.setattr(param_and_grad_buffer._ParamAndGradBucketGroup, "start_param_sync", start_late)
    config = run_config(optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0, weight_decay=0.0))
    config = replace(
        config,
        model=replace(config.model, tie_embeddings=tied),
        parallel=replace(config.parallel, overlap_grad_reduce=overlap, overlap_param_gather=overlap),
        train=replace(config.train, fused_head=fused, max_tokens_per_micro_batch=100),
    )
    updates: list[tuple[float, ...]] = []
    with distributed(config):
        policy = trainer.Policy(config, VOCAB)
        batches = policy.pack(make_samples())
        assert len(batches) > 1
        for i in range(3):
            if i == 1:
                set_logprobs(policy, [batches])
            metrics = UpdateMetrics()
            policy.train_step(batches, PolicyLossConfig(objective="no_is", clip_low=0.99, clip_high=1e9), metrics)
            reduced = metrics.reduce()
            updates.append(tuple(reduced[name] for name in ("value", "nll", "grad_norm", "log_ratio_max")))
        if overlap:
            assert len(policy.model.bucket_groups) > 2
            assert len(gathered) > 2 * len(policy.model.bucket_groups)
    return updates


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_may_be_gathered_while_the_forward_pass_runs(tied: bool) -> None:
    """Megatron's overlap_param_gather waits for a layer's parameters in forward hooks of the layer."""
    logits, *others = (
        run(2, train_while_parameters_are_gathered, fused, overlap, tied)
        for fused, overlap in ((False, False), (False, True), (True, True))
    )
    for other in others:
        for updates in other:
            for found, expected in zip(updates, logits[0], strict=True):
                assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert logits[0][2][3] > 0.1


def leaves(dtype: torch.dtype, main_grad: bool, **changes: Any) -> dict[str, Any]:
    inputs = random_inputs(1, dtype, **changes)
    if main_grad:
        inputs["weight"].main_grad = torch.zeros(SHARD, WIDTH)
    return inputs


@pytest.mark.parametrize("main_grad", [False, True])
def test_a_loss_scale_keeps_float16_from_underflowing(main_grad: bool) -> None:
    scale, config = 2.0**14, PolicyLossConfig(objective="no_is", clip_low=0.99, clip_high=1e9)
    tiny: dict[str, Any] = {"advantages": torch.full((TOKENS,), 1e-6)}
    exact = leaves(torch.float16, False)
    exact = {**exact, **{name: exact[name].detach().double().requires_grad_() for name in ("hidden", "weight")}}
    without, scaled = leaves(torch.float16, main_grad, **tiny), leaves(torch.float16, main_grad, **tiny)
    fused_linear_policy_loss(**exact | tiny, config=config).loss_sum.backward()
    fused_linear_policy_loss(**without, config=config).loss_sum.backward()
    (scale * fused_linear_policy_loss(**scaled, config=config, loss_scale=scale).loss_sum).backward()

    def off(inputs: dict[str, Any], name: str, scale: float = 1.0) -> float:
        found = inputs[name].main_grad if main_grad and name == "weight" else inputs[name].grad
        expected = exact[name].grad
        return float((found.double() / scale - expected).norm() / expected.norm())

    for name in ("hidden", "weight"):
        assert off(without, name) > 0.05
        assert off(scaled, name, scale) < 0.002
