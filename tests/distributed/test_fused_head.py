"""The fused head on real gloo ranks against autograd over the whole vocabulary and the whole stream.

By default each layout runs every type, objective and aggregation once, in float64 packed and unpacked. In other types
packing takes turns, as do chunk size, tied or untied weight, and gradient in `main_grad` or autograd. The six layouts
together cover each combination in float64 with every chunk size, tied and untied. With EVERY_COMBINATION=1 each layout
runs them all.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from heads import DTYPES, Head, Place
from oracle import Batch, Reference, anchored, make_batch, reference
from ranks import run, run_config
from torch import Tensor

from megatron_aspo.config.loss import Aggregation, ObjectiveName, PolicyLossConfig
from megatron_aspo.ranks.process_group import distributed

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
CHUNKS = (64, 257, 1 << 20)
EVERY_COMBINATION = "EVERY_COMBINATION" in os.environ
"""Environment variable that runs all cases: nine times as many, in nine times the time."""


def config_of(objective: Any, aggregation: Any) -> PolicyLossConfig:
    """Spread every KL estimator, rollout correction and the entropy bonus over objectives and aggregations."""
    i, j = get_args(ObjectiveName).index(objective), get_args(Aggregation).index(aggregation)
    return PolicyLossConfig(
        objective=objective,
        aggregation=aggregation,
        clip_high=0.3,
        dual_clip=3.0,
        norm_length=50,
        kl_coef=0.1,
        kl_estimator=("k1", "k2", "k3")[(i + j) % 3],
        entropy_coef=0.05 * ((i + j) % 2),
        rollout_correction=("none", "truncate", "mask")[(i + 2 * j) % 3],
    )


CONFIGS = {(o, a): config_of(o, a) for o in get_args(ObjectiveName) for a in get_args(Aggregation)}
# The sampler as anchor; ASPO and half of the others with a band.
for _i, _objective in enumerate(get_args(ObjectiveName)):
    CONFIGS[_objective, "anchored"] = replace(
        CONFIGS[_objective, get_args(Aggregation)[_i % 4]],
        rollout_correction="none",
        anchor="rollout",
        anchor_band=(0.3, 3.5) if _i % 2 or _objective == "aspo" else None,
    )


def batch_of(packed: bool, tied: bool, dtype: torch.dtype, config: PolicyLossConfig) -> Batch:
    batch = make_batch(packed, tied, dtype)
    return anchored(batch) if config.anchor == "rollout" else batch


def write_references(folder: Path) -> None:
    """Map (dtype, packed, tied, objective, aggregation) to a float64 reference, and to a bfloat16 one for bfloat16."""
    references: dict[Any, tuple[Reference, Reference | None]] = {}
    for dtype in DTYPES:
        for packed in (False, True):
            for tied in (False, True):
                for names, config in CONFIGS.items():
                    batch = batch_of(packed, tied, dtype, config)
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
    """For each case: its name, the head's errors, and for bfloat16 the errors of log_softmax in bfloat16."""
    references = torch.load(file, weights_only=False, mmap=True)
    cases: list[Any] = []
    heads: list[Head] = []
    with distributed(run_config()):
        place = Place(tp, cp)
        for key, found in references.items():
            dtype, packed, tied, *names = key
            batch = batch_of(packed, tied, dtype, CONFIGS[tuple(names)])
            # Six layouts: all pairs of one of two and one of three.
            layout = LAYOUTS.index((tp, cp))
            turn = DTYPES.index(dtype) + list(CONFIGS).index(tuple(names)) + layout
            skipped = dtype != torch.float64 and packed != turn // 2 % 2 and not EVERY_COMBINATION
            turn += 2 * packed
            for j, chunk_size in enumerate(() if skipped else CHUNKS):
                if (tied, j) == (turn % 2, turn % len(CHUNKS)) or EVERY_COMBINATION:
                    main_grad = (turn // 2 + j) % 2 == 1
                    heads.append(Head(place, batch, CONFIGS[tuple(names)], main_grad, chunk_size=chunk_size))
                    cases.append(((*key, chunk_size, main_grad), batch, *found))
        # sums over context-parallel ranks, in one collective for all cases
        values = torch.stack([torch.stack([h.output.loss_sum, h.output.denominator]).double() for h in heads])
        gradients = torch.stack([head.grad_weight for head in heads])
        if cp > 1:
            dist.all_reduce(values, group=place.cp_group)
            dist.all_reduce(gradients, group=place.cp_group)

    def errors(loss_sum: float, tensors: list[Any], expected: Reference, batch: Batch) -> Errors:
        """Errors of `tensors`: log-probs, entropy, gradients of this rank's hidden states and of its weight."""
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


NAMES = ("logprobs", "entropy", "hidden", "weight")


def relative(ranks: list[Errors]) -> dict[str, float]:
    """||error|| / ||reference|| of whole tensors."""
    return {
        name: math.sqrt(sum(r[name][0] for r in ranks) / sum(r[name][1] for r in ranks)) for name in ("loss", *NAMES)
    }


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_value_and_gradients_are_those_of_autograd_over_the_whole(tp: int, cp: int, references: Path) -> None:
    results = list(zip(*run(tp * cp, compare, tp, cp, references), strict=True))
    assert len(results) == len(CONFIGS) * (len(DTYPES) * 2 * len(CHUNKS) * 2 if EVERY_COMBINATION else 2 + 1 + 1)
    losses: list[tuple[float, float]] = []
    for ranks in results:
        (dtype, *case), errors = ranks[0][0], relative([head for _, head, _ in ranks])
        if dtype == torch.bfloat16:
            usual = relative([usual for _, _, usual in ranks])
            # A single number may be right by chance; the largest of many is not.
            losses.append((errors.pop("loss"), usual["loss"]))
            for name, value in errors.items():
                assert value <= 2 * usual[name], (case, name, value, usual[name])
        else:
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] < {torch.float64: 1e-12, torch.float32: 1e-6}[dtype], (case, worst)
    assert max(head for head, _ in losses) <= 2 * max(usual for _, usual in losses)


# --- Per-response quantities, and sequence parallelism ---

RESPONSE_WISE = {
    "entropy split": PolicyLossConfig(entropy_quantile=0.8, clip_high=0.3),
    "entropy split of gspo": PolicyLossConfig(
        objective="gspo", entropy_quantile=0.3, aggregation="seq-mean-token-mean"
    ),
    "entropy split of gmpo": PolicyLossConfig(
        objective="gmpo", entropy_quantile=0.3, aggregation="seq-mean-token-mean"
    ),
    "truncate": PolicyLossConfig(rollout_correction="truncate", rollout_ratio_high=1.5),
    "mask": PolicyLossConfig(
        objective="grpo", dual_clip=3.0, rollout_correction="mask", aggregation="seq-mean-token-sum"
    ),
    "band": PolicyLossConfig(rollout_sequence_low=0.97, rollout_sequence_high=1.1, kl_coef=0.1),
    "veto": PolicyLossConfig(objective="cispo", rollout_veto=0.37, entropy_coef=0.1),
    "anchor": PolicyLossConfig(
        objective="gspo", anchor="rollout", anchor_band=(0.3, 3.5), aggregation="seq-mean-token-mean"
    ),
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
    """For each case: its name, (split, whole) values by metric, and the errors of the split head."""
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
def test_split_responses_give_the_same_per_response_quantities(
    tp: int, cp: int, sequence_parallel: bool, zigzag: bool
) -> None:
    for results in run(tp * cp, spread_and_whole, tp, cp, sequence_parallel, zigzag):
        assert len(results) == 2 * len(RESPONSE_WISE)
        for case, numbers, errors in results:
            for name, (spread, whole) in numbers.items():
                assert spread == pytest.approx(whole, rel=1e-12, abs=1e-12), (case, name)
            assert max(errors.values()) < 1e-12, (case, errors)
        # Each case cuts, drops or splits some of its tokens.
        by_case = {case: numbers for case, numbers, _ in results}
        for packing in ("rows", "packed"):
            tokens = by_case[f"truncate, {packing}"]["rollout_cut count"][1]
            for name in ("truncate", "mask", "all"):
                assert 0.02 < by_case[f"{name}, {packing}"]["rollout_cut sum"][1] / tokens < 0.5, (name, packing)
            for name in ("band", "veto"):
                assert 0.1 < by_case[f"{name}, {packing}"]["rollout_dropped sum"][1] / tokens < 1, (name, packing)
