"""The fused head on real gloo ranks against autograd over the whole vocabulary and the whole stream.

By default each layout runs every type, packing, objective and aggregation once: with one chunk size, with a tied or an
untied weight, and with the weight's gradient in `main_grad` or in autograd, which take turns; the six layouts together
run each with every chunk size, tied and untied. With EVERY_COMBINATION=1 each layout runs them all.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from oracle import TEMPERATURE, VOCAB, Batch, Reference, make_batch, reference
from ranks import VOCAB as RANKS_VOCAB
from ranks import ends, make_samples, run, run_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from watch import Watch

from benchmarks.counting import Count
from megatron_aspo.config import Aggregation, Objective, OptimizerConfig, ParallelConfig, PolicyLossConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.loss import LossOutput, fused_linear_logprobs, fused_linear_policy_loss, response_terms_of
from megatron_aspo.packing import stream_part
from megatron_aspo.policy import model, trainer
from megatron_aspo.policy.model import _architecture, initialize_parallel, transformer_config

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
CHUNKS = (64, 257, 1 << 20)
EVERY_COMBINATION = "EVERY_COMBINATION" in os.environ
"""Set it for six times as many cases in six times the time."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def config_of(objective: Any, aggregation: Any) -> PolicyLossConfig:
    """Every KL estimator, rollout correction and the entropy bonus, spread over objectives and aggregations."""
    i, j = get_args(Objective).index(objective), get_args(Aggregation).index(aggregation)
    return PolicyLossConfig(
        objective=objective,
        aggregation=aggregation,
        clip_high=0.3,
        norm_length=50,
        kl_coef=0.1,
        kl_estimator=("k1", "k2", "k3")[(i + j) % 3],
        entropy_coef=0.05 * ((i + j) % 2),
        rollout_correction=("none", "truncate", "mask")[(i + 2 * j) % 3],
    )


CONFIGS = {(o, a): config_of(o, a) for o in get_args(Objective) for a in get_args(Aggregation)}


class Place:
    """This rank's groups in a world of tp x cp ranks (any world for 1 x 1); the ranks of a tensor-parallel group are
    not neighbours. Without `zigzag` context parallelism cuts the stream itself: then the ranks' responses differ."""

    def __init__(self, tp: int, cp: int, zigzag: bool = True) -> None:
        self.tp, self.cp, self.zigzag = tp, cp, zigzag
        self.tp_group: Any = None
        self.cp_group: Any = None
        self.tp_rank = self.cp_rank = 0
        if tp * cp > 1:
            self.tp_rank, self.cp_rank = divmod(dist.get_rank(), cp)
            tp_groups = [dist.new_group([c + cp * t for t in range(tp)]) for c in range(cp)]
            cp_groups = [dist.new_group([c + cp * t for c in range(cp)]) for t in range(tp)]
            self.tp_group = tp_groups[self.cp_rank] if tp > 1 else None
            self.cp_group = cp_groups[self.tp_rank] if cp > 1 else None

    def part(self, values: Tensor, batch: Batch) -> Tensor:
        """This rank's tokens of [T, ...] or [B, T, ...]."""
        where = torch.arange(batch.tokens.shape[-1]).chunk(self.cp)[self.cp_rank]
        if self.zigzag:
            where = stream_part(batch.part_of, self.cp_rank, self.cp)
        return values.index_select(batch.tokens.dim() - 1, where)

    def shard(self, whole: Tensor) -> Tensor:
        """This rank's part of the first dimension."""
        return whole.chunk(self.tp)[self.tp_rank].clone()

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        local = tokens - self.tp_rank * len(weight)
        own = (local >= 0) & (local < len(weight))
        embedded = F.embedding(local.masked_fill(~own, 0), weight) * own[..., None]
        return embedded if self.tp_group is None else reduce_from_tensor_model_parallel_region(embedded, self.tp_group)


def spoilt_data(place: Place, batch: Batch) -> dict[str, Any]:
    """This rank's part of the batch's data; what is masked is spoilt."""
    data = {name: place.part(values, batch) for name, values in batch.data.items()}
    masked = ~data["loss_mask"]
    for name, values in data.items():
        if values.is_floating_point():
            data[name] = values.masked_fill(masked, torch.nan)
    data["targets"] = data["targets"].masked_fill(masked, -100)
    return data


def head_loss(
    place: Place, batch: Batch, config: PolicyLossConfig, base: Tensor, weight: Tensor, **options: Any
) -> LossOutput:
    """The fused head on this rank's part of the batch; what is masked is spoilt. Under sequence parallelism rows go
    sequence first, as in Megatron."""
    data = spoilt_data(place, batch)
    masked = ~data["loss_mask"]
    if options.get("sequence_parallel"):
        if batch.tokens.dim() == 2:
            data = {name: values.transpose(0, 1) for name, values in data.items()}
    elif batch.tokens.dim() == 2:
        del data["sequence_ids"]  # each row is a response
    hidden = base
    if batch.tied:
        hidden = base + 0.5 * place.embed(place.part(batch.tokens, batch), weight)
    if not options.get("sequence_parallel"):
        hidden = hidden.masked_fill(masked[..., None], torch.nan)
    options = {"chunk_size": 64, "temperature": TEMPERATURE, "vocab_size": VOCAB} | options
    groups = {"tp_group": place.tp_group, "cp_group": place.cp_group}
    return fused_linear_policy_loss(hidden, weight, **data, config=config, **groups, **options)


class Head:
    """Output and gradients of `head_loss` with a weight of its own. Under `main_grad` the weight is what Megatron
    makes of it, and `grad_weight` what its hook would find."""

    def __init__(
        self, place: Place, batch: Batch, config: PolicyLossConfig, main_grad: bool = False, **options: Any
    ) -> None:
        weight: Any = place.shard(batch.weight).requires_grad_()
        if main_grad:
            fine = torch.float64 if weight.dtype == torch.float64 else torch.float32
            weight.main_grad = torch.zeros(weight.shape, dtype=fine)
            weight.grad_added_to_main_grad = False
            weight.zero_out_wgrad = batch.tied
        base = place.part(batch.base, batch)
        if options.get("sequence_parallel"):
            base = place.shard(base.transpose(0, 1) if batch.tokens.dim() == 2 else base)
        base.requires_grad_()
        self.output = head_loss(place, batch, config, base, weight, **options)
        self.output.loss_sum.backward()
        assert base.grad is not None
        self.grad_hidden = base.grad
        if not main_grad:
            assert weight.grad.dtype == weight.dtype
            self.grad_weight = weight.grad.double()
            return
        assert weight.grad_added_to_main_grad
        assert (weight.grad is None) != batch.tied  # what stands in for a gradient is gone
        self.grad_weight = weight.main_grad.double()
        if batch.tied:
            self.grad_weight = self.grad_weight + weight.grad


def write_references(folder: Path) -> None:
    """(dtype, packed, tied, objective, aggregation) -> reference in float64, and for bfloat16 the usual path's."""
    references: dict[Any, tuple[Reference, Reference | None]] = {}
    for dtype in DTYPES:
        for packed in (False, True):
            for tied in (False, True):
                batch = make_batch(packed, tied, dtype)
                for names, config in CONFIGS.items():
                    usual = reference(batch, config, dtype) if dtype == torch.bfloat16 else None
                    references[dtype, packed, tied, *names] = reference(batch, config), usual
    torch.save(references, folder / "references.pt")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    run(1, write_references, folder)
    return folder / "references.pt"


Errors = dict[str, tuple[float, float]]
"""name -> (squared error, squared reference), to be summed over ranks."""


def compare(tp: int, cp: int, file: Path) -> list[tuple[Any, Errors, Errors]]:
    """(case, errors of the head, errors of the usual path where there is one) of every case."""
    references = torch.load(file, weights_only=False, mmap=True)
    cases: list[Any] = []
    heads: list[Head] = []
    with distributed(run_config()):
        place = Place(tp, cp)
        for key, found in references.items():
            dtype, packed, tied, *names = key
            batch = make_batch(packed, tied, dtype)
            # Six layouts: all pairs of one of two and one of three.
            layout = LAYOUTS.index((tp, cp))
            turn = DTYPES.index(dtype) + 2 * packed + list(CONFIGS).index(tuple(names)) + layout
            for j, chunk_size in enumerate(CHUNKS):
                if (tied, j) == (turn % 2, turn % len(CHUNKS)) or EVERY_COMBINATION:
                    main_grad = (turn // 2 + j) % 2 == 1
                    heads.append(Head(place, batch, CONFIGS[tuple(names)], main_grad, chunk_size=chunk_size))
                    cases.append(((*key, chunk_size, main_grad), batch, *found))
        # Sums over context-parallel ranks, in one collective for all cases.
        values = torch.stack([torch.stack([h.output.loss_sum, h.output.denominator]).double() for h in heads])
        gradients = torch.stack([head.grad_weight for head in heads])
        if cp > 1:
            dist.all_reduce(values, group=place.cp_group)
            dist.all_reduce(gradients, group=place.cp_group)

    def errors(loss_sum: float, tensors: list[Any], expected: Reference, batch: Batch) -> Errors:
        """`tensors`: log-probs, entropy, gradients of this rank's hidden states and of its weight."""
        squares = {"loss": ((loss_sum - expected.loss_sum) ** 2, expected.size**2)}
        mask = place.part(batch.data["loss_mask"], batch)
        for name, tensor, whole in zip(NAMES, tensors, local(expected, batch), strict=True):
            a, b = (x[mask] if name in ("logprobs", "entropy") else x for x in (tensor.double(), whole))
            squares[name] = float((a - b).square().sum()), float(b.square().sum())
        return squares

    def local(whole: Reference, batch: Batch) -> list[Tensor]:
        tokens = [place.part(x, batch) for x in (whole.logprobs, whole.entropy, whole.grad_hidden)]
        return [*tokens, place.shard(whole.grad_weight)]

    results: list[Any] = []
    for (key, batch, expected, usual), head, (loss_sum, denominator), gradient in zip(
        cases, heads, values.tolist(), gradients, strict=True
    ):
        assert denominator == expected.denominator, key
        tensors = [head.output.logprobs, head.output.entropy, head.grad_hidden, gradient]
        of_head = errors(loss_sum, tensors, expected, batch)
        of_usual = errors(usual.loss_sum, local(usual, batch), expected, batch) if usual else {}
        results.append((key, of_head, of_usual))
    return results


def test_chunks_are_several_and_uneven() -> None:
    for packed, cp in ((True, 1), (False, 1), (True, 2)):
        batch = make_batch(packed, False, torch.float64)
        mask = batch.data["loss_mask"]
        for rank in range(cp):
            tokens = int(mask.index_select(mask.dim() - 1, stream_part(batch.part_of, rank, cp)).sum())
            for chunk_size in CHUNKS[:2]:
                chunks = math.ceil(tokens / chunk_size)
                assert chunks >= 3
                assert tokens % math.ceil(tokens / chunks), "the last chunk is as long as the others"


NAMES = ("logprobs", "entropy", "hidden", "weight")


def relative(ranks: list[Errors]) -> dict[str, float]:
    """||error|| / ||reference|| of whole tensors."""
    return {
        name: math.sqrt(sum(r[name][0] for r in ranks) / sum(r[name][1] for r in ranks)) for name in ("loss", *NAMES)
    }


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_value_and_gradients_are_those_of_autograd_over_the_whole(tp: int, cp: int, references: Path) -> None:
    results = list(zip(*run(tp * cp, compare, tp, cp, references), strict=True))
    assert len(results) == len(DTYPES) * len(CONFIGS) * 2 * (len(CHUNKS) * 2 if EVERY_COMBINATION else 1)
    losses: list[tuple[float, float]] = []
    for ranks in results:
        (dtype, *case), errors = ranks[0][0], relative([head for _, head, _ in ranks])
        if dtype == torch.bfloat16:
            usual = relative([usual for _, _, usual in ranks])
            # One number may be right by chance; the largest of many is not.
            losses.append((errors.pop("loss"), usual["loss"]))
            for name, value in errors.items():
                assert value <= 2 * usual[name], (case, name, value, usual[name])
        else:
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] < {torch.float64: 1e-12, torch.float32: 1e-6}[dtype], (case, worst)
    assert max(head for head, _ in losses) <= 2 * max(usual for _, usual in losses)


# --- What belongs to whole responses, and sequence parallelism ---

RESPONSE_WISE = {
    "entropy split": PolicyLossConfig(entropy_quantile=0.8, clip_high=0.3),
    "entropy split of gspo": PolicyLossConfig(
        objective="gspo", entropy_quantile=0.3, aggregation="seq-mean-token-mean"
    ),
    "truncate": PolicyLossConfig(rollout_correction="truncate", rollout_ratio_high=1.5),
    "mask": PolicyLossConfig(objective="grpo", rollout_correction="mask", aggregation="seq-mean-token-sum"),
    "band": PolicyLossConfig(rollout_sequence_low=0.97, rollout_sequence_high=1.1, kl_coef=0.1),
    "veto": PolicyLossConfig(objective="cispo", rollout_veto=0.37, entropy_coef=0.1),
    "all": PolicyLossConfig(
        objective="response_mean_is",
        entropy_quantile=0.5,
        rollout_correction="truncate",
        rollout_sequence_low=0.9,
        rollout_veto=0.3,
        aggregation="seq-mean-token-mean",
    ),
}

Numbers = dict[str, tuple[float, float]]


def spread_and_whole(
    tp: int, cp: int, sequence_parallel: bool, zigzag: bool
) -> list[tuple[str, Numbers, dict[str, float]]]:
    """(case, numbers of a spread head with those of a head alone, errors of a spread head) of every case."""
    results: list[tuple[str, Numbers, dict[str, float]]] = []
    with distributed(run_config()):
        place, alone = Place(tp, cp, zigzag), Place(1, 1)
        for packed in (False, True):
            batch = make_batch(packed, False, torch.float64)
            for name, config in RESPONSE_WISE.items():
                spread = Head(place, batch, config, sequence_parallel=sequence_parallel)
                whole = Head(alone, batch, config)
                expected = reference(batch, config)
                grad_hidden = place.part(expected.grad_hidden, batch)
                if sequence_parallel:
                    grad_hidden = place.shard(grad_hidden if packed else grad_hidden.transpose(0, 1))

                sums = [spread.output.loss_sum, spread.output.denominator]
                sums += [number for pair in spread.output.metrics.values() for number in pair]
                total = torch.stack([number.double() for number in sums])
                maxima = torch.stack([*spread.output.maxima.values()])
                if cp > 1:
                    dist.all_reduce(total, group=place.cp_group)
                    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=place.cp_group)
                    dist.all_reduce(spread.grad_weight, group=place.cp_group)
                names = ["loss_sum", "denominator"]
                names += [f"{metric} {what}" for metric in spread.output.metrics for what in ("sum", "count")]
                others = [whole.output.loss_sum, whole.output.denominator]
                others += [number for pair in whole.output.metrics.values() for number in pair]
                pairs = zip(total.tolist(), [float(x) for x in others], strict=True)
                numbers = dict(zip(names, pairs, strict=True))
                for metric, largest in zip(spread.output.maxima, maxima.tolist(), strict=True):
                    numbers[metric] = largest, float(whole.output.maxima[metric])
                errors = {
                    "loss": abs(float(total[0]) - expected.loss_sum) / expected.size,
                    "denominator": abs(float(total[1]) - expected.denominator),
                    "hidden": float((spread.grad_hidden - grad_hidden).norm() / expected.grad_hidden.norm()),
                    "weight": float(
                        (spread.grad_weight - place.shard(expected.grad_weight)).norm() / expected.grad_weight.norm()
                    ),
                }
                results.append((f"{name}, {'packed' if packed else 'rows'}", numbers, errors))
    return results


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "zigzag"),
    [(1, 2, False, True), (1, 2, False, False), (2, 2, True, True), (4, 1, True, True)],
)
def test_what_belongs_to_responses_is_the_same_when_they_are_spread(
    tp: int, cp: int, sequence_parallel: bool, zigzag: bool
) -> None:
    for results in run(tp * cp, spread_and_whole, tp, cp, sequence_parallel, zigzag):
        assert len(results) == 2 * len(RESPONSE_WISE)
        for case, numbers, errors in results:
            for name, (spread, whole) in numbers.items():
                assert spread == pytest.approx(whole, rel=1e-12, abs=1e-12), (case, name)
            assert max(errors.values()) < 1e-12, (case, errors)
        # Each case is one in which something is cut, dropped or split.
        by_case = {case: numbers for case, numbers, _ in results}
        for packing in ("rows", "packed"):
            tokens = by_case[f"truncate, {packing}"]["rollout_cut count"][1]
            for name in ("truncate", "mask", "all"):
                assert 0.02 < by_case[f"{name}, {packing}"]["rollout_cut sum"][1] / tokens < 0.5, (name, packing)
            for name in ("band", "veto"):
                assert 0.1 < by_case[f"{name}, {packing}"]["rollout_dropped sum"][1] / tokens < 1, (name, packing)


# --- Responses that lie across micro-batches and context-parallel ranks ---

IN_MICRO_BATCHES = {
    "mean of means": PolicyLossConfig(aggregation="seq-mean-token-mean", kl_coef=0.1, entropy_coef=0.05),
    "gspo": PolicyLossConfig(objective="gspo", rollout_sequence_high=1.1),
    "entropy split": PolicyLossConfig(entropy_quantile=0.8, rollout_correction="truncate", rollout_ratio_high=1.5),
}


def in_micro_batches() -> list[tuple[str, Numbers, dict[str, float]]]:
    """(case, numbers of the sum over micro-batches with those of a head alone, errors of gradients) at CP = 2."""
    results: list[tuple[str, Numbers, dict[str, float]]] = []
    with distributed(run_config()):
        place, alone = Place(1, 2), Place(1, 1)
        batch = make_batch(True, False, torch.float64)
        data = spoilt_data(place, batch)
        count = len(data["targets"])
        # As the turns of trajectories: pieces of ten tokens by turns.
        parts = [(torch.arange(count) // 10 % 3 == i).nonzero()[:, 0] for i in range(3)]
        longest = int(batch.data["sequence_ids"][0])
        assert all((data["loss_mask"] & (data["sequence_ids"] == longest))[where].any() for where in parts)
        for name, config in IN_MICRO_BATCHES.items():
            base = place.part(batch.base, batch).requires_grad_()
            weight = batch.weight.clone().requires_grad_()
            inputs: list[tuple[Tensor, dict[str, Any]]] = []
            for where in parts:
                own = {key: values[where] for key, values in data.items()}
                hidden = base[where].masked_fill(~own["loss_mask"][:, None], torch.nan)
                inputs.append((hidden, own))
            options: dict[str, Any] = {"chunk_size": 64, "temperature": TEMPERATURE, "vocab_size": VOCAB}
            known: list[dict[str, Any]] = []
            for hidden, own in inputs:
                targets, mask = own["targets"], own["loss_mask"]
                logprobs, entropy = fused_linear_logprobs(hidden, weight, targets, loss_mask=mask, **options)
                tensors = {key: values for key, values in own.items() if key != "targets"}
                known.append({"logprobs": logprobs, "entropy": entropy, **tensors})
            with Watch() as watch:
                terms = response_terms_of(known, config, place.cp_group)
            assert len(watch.collectives) == 1
            sums: list[Tensor] = []
            for (hidden, own), own_terms in zip(inputs, terms, strict=True):
                with Watch() as watch:
                    output = fused_linear_policy_loss(
                        hidden,
                        weight,
                        **own,
                        config=config,
                        cp_group=place.cp_group,
                        response_terms=own_terms,
                        allow_empty=True,
                        **options,
                    )
                    output.loss_sum.backward()
                assert not watch.collectives
                numbers = [output.loss_sum, output.denominator, *(x for pair in output.metrics.values() for x in pair)]
                sums.append(torch.stack([x.detach().double() for x in numbers]))
            total = torch.stack(sums).sum(0)
            dist.all_reduce(total, group=place.cp_group)
            assert base.grad is not None
            assert weight.grad is not None
            dist.all_reduce(weight.grad, group=place.cp_group)

            whole, by_autograd = Head(alone, batch, config), reference(batch, config)
            expected = [whole.output.loss_sum, whole.output.denominator]
            expected += [x for pair in whole.output.metrics.values() for x in pair]
            names = ["loss_sum", "denominator"]
            names += [f"{metric} {what}" for metric in whole.output.metrics for what in ("sum", "count")]
            pairs = zip(total.tolist(), [float(x) for x in expected], strict=True)
            errors = {
                "hidden": float((base.grad - place.part(whole.grad_hidden, batch)).norm() / whole.grad_hidden.norm()),
                "weight": float((weight.grad - whole.grad_weight).norm() / whole.grad_weight.norm()),
                "value": abs(float(total[0]) - by_autograd.loss_sum) / by_autograd.size,
            }
            results.append((name, dict(zip(names, pairs, strict=True)), errors))
    return results


def test_responses_may_lie_across_micro_batches_and_ranks() -> None:
    for results in run(2, in_micro_batches):
        assert [name for name, _, _ in results] == list(IN_MICRO_BATCHES)
        for case, numbers, errors in results:
            for name, (found, whole) in numbers.items():
                assert found == pytest.approx(whole, rel=1e-12, abs=1e-12), (case, name)
            assert max(errors.values()) < 1e-12, (case, errors)


# --- Collectives and sizes ---

TOKENS, WIDTH, SHARD, CHUNK = 256, 4, 200, 64

COUNTED = {
    "aspo": PolicyLossConfig(),
    "mean of means": PolicyLossConfig(aggregation="seq-mean-token-mean", entropy_coef=0.1),
    "veto": PolicyLossConfig(rollout_veto=0.1),
    "gspo": PolicyLossConfig(objective="gspo"),
    "response_mean_is": PolicyLossConfig(objective="response_mean_is"),
    "entropy split": PolicyLossConfig(entropy_quantile=0.8),
}
RESPONSE_ROWS = {"aspo": 0, "mean of means": 2, "veto": 3, "gspo": 3, "response_mean_is": 3, "entropy split": 3}
"""Numbers a token that go to all context-parallel ranks: mask, id, and what a response's term is made of."""


def random_inputs(tp: int, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(SHARD, WIDTH, generator=generator).to(dtype).requires_grad_()
    old = torch.full((TOKENS,), -5.0)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.arange(TOKENS) % (SHARD * tp),
        "old_logprobs": old,
        "advantages": torch.ones(TOKENS),
        "loss_mask": torch.ones(TOKENS, dtype=torch.bool),
        "rollout_logprobs": old + 0.1,
        "sequence_ids": torch.arange(TOKENS) // 50,
        "chunk_size": CHUNK,
        **changes,
    }


def count(tp: int, cp: int) -> dict[tuple[str, bool], tuple[Any, Any, int]]:
    """(case, sequence parallelism) -> collectives forward and backward, and the largest tensor's elements."""
    found: dict[tuple[str, bool], tuple[Any, Any, int]] = {}
    with distributed(run_config()):
        place = Place(tp, cp)
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for name, config in COUNTED.items():
                inputs = random_inputs(tp, tp_group=place.tp_group)
                if sequence_parallel:
                    inputs["hidden"] = place.shard(inputs["hidden"].detach()).requires_grad_()
                inputs["sequence_parallel"] = sequence_parallel
                with Watch() as forward:
                    output = fused_linear_policy_loss(**inputs, config=config, cp_group=place.cp_group)
                with Watch() as backward:
                    output.loss_sum.backward()
                sizes = max(forward.largest, backward.largest)
                found[name, sequence_parallel] = forward.collectives, backward.collectives, sizes
            unknown = ("old_logprobs", "advantages", "rollout_logprobs", "sequence_ids")
            inputs = {name: value for name, value in inputs.items() if name not in unknown}
            with Watch() as forward:
                fused_linear_logprobs(**inputs)
            found["log-probs", sequence_parallel] = forward.collectives, [], forward.largest
    return found


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 2), (4, 1), (2, 2)])
def test_collectives_are_one_per_chunk_and_one_in_the_backward_pass(tp: int, cp: int) -> None:
    for found in run(tp * cp, count, tp, cp):
        assert len(found) == (len(COUNTED) + 1) * (2 if tp > 1 else 1)
        for (name, sequence_parallel), (forward, backward, largest) in found.items():
            states = [("allgather_base", TOKENS // tp * WIDTH * 4)] if sequence_parallel else []
            two_sweeps = name in ("gspo", "response_mean_is", "entropy split", "log-probs")
            chunk = TOKENS if two_sweeps else CHUNK
            statistics = [("allgather_base", 16 * chunk)] * (TOKENS // chunk) if tp > 1 else []
            rows = RESPONSE_ROWS.get(name, 0) if cp > 1 else 0
            responses = [("allgather_base", 8 * rows * TOKENS)] if rows else []
            middle = statistics + responses if two_sweeps else responses + statistics
            assert forward == states + middle, name
            reduction = "reduce_scatter_base" if sequence_parallel else "allreduce"
            expected = [(reduction, TOKENS * WIDTH * 4)] if tp > 1 and name != "log-probs" else []
            assert backward == expected, name
            assert largest == CHUNK * SHARD, name


# --- Megatron's gradient buffer ---

MICRO_BATCHES = [(True, 1.0), (False, -2.0), (True, -0.5)]
"""(packed, what advantages are multiplied by)"""


def micro_batches(tied: bool, dtype: torch.dtype, dp_rank: int) -> list[Batch]:
    batches: list[Batch] = []
    for packed, factor in MICRO_BATCHES:
        batch = make_batch(packed, tied, dtype)
        advantages = batch.data["advantages"] * factor * (1 - 3 * dp_rank)
        batches.append(replace(batch, data={**batch.data, "advantages": advantages}))
    return batches


class Output(torch.nn.Module):
    """An output layer, whose weight may be the embedding's too."""

    def __init__(self, weight: Tensor, tied: bool) -> None:
        super().__init__()
        self.weight: Any = torch.nn.Parameter(weight)
        if tied:
            self.weight.zero_out_wgrad = True  # as GPTModel says of it

    def forward(self, place: Place, batch: Batch, config: PolicyLossConfig) -> LossOutput:
        base = place.part(batch.base, batch).requires_grad_()
        return head_loss(place, batch, config, base, self.weight)


def accumulate(overlap: bool) -> list[tuple[Any, float, bool]]:
    """(case, error of main_grad, whether the weight is what it was) at TP = 2, DP = 2."""
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
                    transformer_config(config, _architecture(config.model)),
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
    """(value, nll, gradient norm, largest log ratio) of three updates at DP = 2. With `overlap` a parameter is what it
    was before the update until somebody waits for it, as on a slow network."""
    gathered: list[int] = []

    def start_late(group: Any, force_sync: bool = False) -> None:
        assert group.param_gather_handle is None

        class Handle:
            def wait(self) -> None:
                ranks = group.intra_distributed_optimizer_instance_group
                for bucket in group.buckets:
                    mine = bucket.param_data.view(-1).chunk(ranks.size())[ranks.rank()].clone()
                    dist.all_gather_single(bucket.param_data.view(-1), mine, group=ranks)
                gathered.append(id(group))

        group.param_gather_handle = Handle()
        group.param_gather_dispatched = True
        if force_sync:
            group.param_gather_handle.wait()
            group.param_gather_handle = None

    if overlap:  # in a process of its own
        ddp_config, optimizer_config = model.DistributedDataParallelConfig, trainer.MegatronOptimizerConfig
        more: dict[str, Any] = {"overlap_param_gather": True, "bucket_size": 3000}
        patch = pytest.MonkeyPatch()
        patch.setattr(model, "DistributedDataParallelConfig", partial(ddp_config, **more))
        patch.setattr(trainer, "MegatronOptimizerConfig", partial(optimizer_config, overlap_param_gather=True))
        patch.setattr(param_and_grad_buffer._ParamAndGradBucketGroup, "start_param_sync", start_late)
    config = run_config(optimizer=OptimizerConfig(lr=1e-2, lr_warmup_updates=0, weight_decay=0.0))
    config = replace(
        config,
        model=replace(config.model, tie_embeddings=tied),
        parallel=replace(config.parallel, overlap_grad_reduce=overlap),
        train=replace(config.train, fused_head=fused, max_tokens_per_micro_batch=100),
    )
    updates: list[tuple[float, ...]] = []
    with distributed(config):
        policy = trainer.Policy(config, RANKS_VOCAB)
        batches = policy.pack(make_samples())
        assert len(batches) > 1
        for i in range(3):
            if i == 1:
                policy.fill_logprobs(batches, "old_logprobs")
            metrics = trainer.UpdateMetrics()
            policy.train_step(batches, PolicyLossConfig(objective="no_is", clip_low=0.99, clip_high=1e9), metrics)
            reduced = metrics.reduce()
            updates.append(tuple(reduced[name] for name in ("value", "nll", "grad_norm", "log_ratio_max")))
        if overlap:
            assert len(policy.model.bucket_groups) > 2
            assert len(gathered) > 2 * len(policy.model.bucket_groups)
    return updates


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_may_be_gathered_while_the_forward_pass_runs(tied: bool) -> None:
    """Megatron's overlap_param_gather, which waits for a layer's parameters in hooks on the layer's call."""
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


def test_a_loss_scaled_behind_the_back_of_main_grad_is_refused() -> None:
    output = fused_linear_policy_loss(**leaves(torch.float32, True), config=PolicyLossConfig())
    with pytest.raises(ValueError, match=r"loss_scale is 1, the factor 0\.5"):
        (output.loss_sum / 2).backward()


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)])
def test_main_grad_is_multiplied_by_the_loss_scale(scale: float | Tensor) -> None:
    plain, scaled = leaves(torch.float32, False), leaves(torch.float32, True, loss_scale=scale)
    fused_linear_policy_loss(**plain, config=PolicyLossConfig()).loss_sum.backward()
    (2 * fused_linear_policy_loss(**scaled, config=PolicyLossConfig()).loss_sum).backward()
    torch.testing.assert_close(scaled["weight"].main_grad, 2 * plain["weight"].grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled["hidden"].grad, 2 * plain["hidden"].grad, rtol=1e-6, atol=1e-6)


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


# --- Memory ---


class WithoutProducts(TorchDispatchMode):
    """Matrix products are zeros of the right size: they would take longer than everything else, and what is counted
    does not depend on them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        if func is torch.ops.aten.mm.out:
            return kwargs["out"].zero_()
        if func is torch.ops.aten.addmm_.default:
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_does_not_grow_with_the_tokens_but_by_their_own_gradient(
    dtype: torch.dtype, main_grad: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    columns, width, chunk = 4096, 1024, 256
    allowed = 3 * chunk * columns * 4 + (0 if main_grad else 4 * width * columns)
    rest: dict[int, int] = {}
    for tokens in (1024, 4096, 16384):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
        weight: Any = torch.randn(columns, width, generator=generator).to(dtype).requires_grad_()
        if main_grad:
            weight.main_grad = torch.zeros(columns, width)
            weight.grad_added_to_main_grad = False
        inputs: dict[str, Any] = {
            "targets": torch.arange(tokens) % columns,
            "old_logprobs": torch.full((tokens,), -8.0),
            "advantages": torch.ones(tokens),
            "loss_mask": torch.ones(tokens, dtype=torch.bool),
        }
        with WithoutProducts(), Count() as memory:
            output = fused_linear_policy_loss(
                hidden, weight, **inputs, config=PolicyLossConfig(entropy_coef=0.1), chunk_size=chunk
            )
            output.loss_sum.backward()
        assert hidden.grad is not None
        assert hidden.grad.nbytes == tokens * width * hidden.element_size()
        rest[tokens] = memory.peak - hidden.grad.nbytes
        with capsys.disabled():
            print(
                f"\n{dtype}, main_grad={main_grad}, T={tokens}: {memory.peak / 1e6:.2f} MB, "
                f"{rest[tokens] / 1e6:.2f} without the hidden states' gradient; allowed {allowed / 1e6:.2f}",
                end="",
            )
        assert rest[tokens] <= allowed
    # What is kept of a token: a dozen numbers.
    assert rest[4096] - rest[1024] < 100 * (4096 - 1024)
    assert rest[16384] - rest[4096] < 100 * (16384 - 4096)


# --- Bad input ---

BAD: dict[str, dict[str, Any]] = {
    "targets": {"targets": torch.full((TOKENS,), 10**6)},
    "old_logprobs": {"old_logprobs": torch.zeros(TOKENS - 1)},
    "advantages": {"advantages": torch.zeros(TOKENS, dtype=torch.int64)},
    "loss_mask": {"loss_mask": torch.zeros(TOKENS, dtype=torch.bool)},
    "hidden": {"hidden": torch.zeros(WIDTH)},
    "weight": {"weight": torch.zeros(SHARD, WIDTH + 1)},
    "weight is": {"weight": torch.zeros(SHARD, WIDTH, dtype=torch.bfloat16)},
    "sequence_ids": {"sequence_ids": torch.zeros(TOKENS)},
    "rollout_logprobs": {"rollout_logprobs": None},
    "ref_logprobs": {"ref_logprobs": torch.zeros(1, TOKENS)},
    "vocab_size": {"vocab_size": 2 * SHARD + 1},
    "temperature": {"temperature": 0.0},
    "chunk_size": {"chunk_size": 0},
}


def bad_inputs() -> dict[str, tuple[str, int]]:
    """name -> (what the ValueError says, collectives started)."""
    said: dict[str, tuple[str, int]] = {}
    with distributed(run_config()):
        place = Place(2, 1)
        for name, changes in BAD.items():
            inputs = random_inputs(2, tp_group=place.tp_group)
            with Watch() as watch, pytest.raises(ValueError, match=name) as error:
                fused_linear_policy_loss(**inputs | changes, config=COUNTED["veto"])
            said[name] = str(error.value), len(watch.collectives)
    return said


def bad_on_one_rank(name: str) -> None:
    with distributed(run_config()):
        place = Place(2, 1)
        inputs = random_inputs(2, tp_group=place.tp_group)
        if dist.get_rank() == 1:
            inputs |= BAD[name]
        fused_linear_policy_loss(**inputs, config=COUNTED["veto"])


def test_bad_input_is_named_before_any_collective() -> None:
    for said in run(2, bad_inputs):
        assert list(said) == list(BAD)
        for name, (message, collectives) in said.items():
            assert name in message
            assert collectives == 0


@pytest.mark.parametrize("name", ["targets", "weight"])
def test_a_bad_rank_leaves_no_other_rank_hanging(name: str) -> None:
    (code, output), (bad_code, bad_output) = ends(2, bad_on_one_rank, name, timeout=30)
    assert bad_code == code == 1
    assert f"ValueError: {name} " in bad_output
    assert "ValueError" not in output
