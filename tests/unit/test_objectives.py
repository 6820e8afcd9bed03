"""The policy loss against reference vectors, the specification's table, and plain loops."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from scalar_losses import differentiate, numbers, response_terms, scalar_terms
from torch import Tensor

from megatron_aspo.config.loss import WITHOUT_CAP, WITHOUT_RANGE, Aggregation, ObjectiveName, PolicyLossConfig
from megatron_aspo.loss import policy_loss
from megatron_aspo.loss.objectives import TokenInputs, find_objective, token_terms
from megatron_aspo.loss.responses import Responses

OBJECTIVES = get_args(ObjectiveName)
AGGREGATIONS = get_args(Aggregation)
SEQUENCE_WISE = ("gspo", "gmpo", "response_mean_is")
DATA = Path(__file__).parent.parent / "data"
VECTORS = json.loads((DATA / "policy_loss_vectors.json").read_text())["cases"]
"""Inputs, and what other implementations made of them."""
MORE_VECTORS = json.loads((DATA / "objective_vectors.json").read_text())["cases"]
"""More objectives, on the same inputs or on inputs of their own."""


def tensor64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def config_of(objective: str, **fields: Any) -> PolicyLossConfig:
    return PolicyLossConfig(objective=objective, norm_length=7, **{"dual_clip": 3.0, **fields})  # type: ignore[arg-type]


def random_batch(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every input of `policy_loss`: ratios on both sides of all clips, responses of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, columns, generator=generator, dtype=torch.float64)

    old = uniform(-4, -0.05)
    advantages = torch.tensor([1.3, -0.7, 0.0, 0.4, -1.9, 0.8, -0.2])[torch.arange(rows) % 7].double()
    lengths = 1 + torch.arange(rows)[:, None] * 5 % columns
    mask = torch.arange(columns) >= columns - lengths
    batch = {
        "logprobs": old + uniform(-1, 1) ** 3 * 2,
        "old_logprobs": old,
        "advantages": advantages[:, None].expand(rows, columns).clone(),
        "entropy": uniform(0, 3),
        "ref_logprobs": old + uniform(-0.5, 0.5),
        "rollout_logprobs": old + uniform(-0.1, 0.1),
    }
    return {name: values.to(dtype) for name, values in batch.items()} | {"loss_mask": mask}


# --- Against the reference vectors ---


def _vector_config(name: str, params: dict[str, Any]) -> PolicyLossConfig:
    objective = params.get("objective") or {"aspo": "aspo", "ppo": "grpo"}.get(name.split("_")[0], name)
    renamed = {"agg": "aggregation", "tau_pos": "sapo_tau_pos", "tau_neg": "sapo_tau_neg"}
    renamed["low_entropy_clip"] = "clip_low"
    fields: dict[str, Any] = {
        renamed.get(key, key): value for key, value in params.items() if key != "quantile_over"
    } | {"objective": objective}
    if "clip_low" in fields:
        fields.setdefault("clip_high", fields["clip_low"])
    return PolicyLossConfig(**fields)


def _vector_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    names = ("old_logprobs", "advantages", "logprobs", "entropy")
    inputs = {key: tensor64(case[key]) for key in names if key in case}
    return inputs | {"loss_mask": torch.tensor(case["mask"])}


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case['seed']}-{name}") for case in VECTORS for name in case["expect"]],
)
def test_reference_vectors(case: dict[str, Any], name: str) -> None:
    expect = case["expect"][name]
    inputs, config = _vector_inputs(case), _vector_config(name, expect["params"])
    out, gradient, _ = differentiate(inputs, config)
    assert out.loss_sum.item() / out.denominator.item() == pytest.approx(expect["loss"], rel=1e-8)
    torch.testing.assert_close(gradient / out.denominator, tensor64(expect["dloss_dlogprobs"]), rtol=1e-8, atol=1e-10)

    # The reference divides hard clips by all tokens, and treats A = 0 as A > 0.
    mask = inputs["loss_mask"] == 1
    hard = {sign: out.metrics[f"clip_fraction_{sign}"][0].item() for sign in ("pos", "neg")}
    soft = {sign: (a / b).item() for sign in ("pos", "neg") for a, b in [out.metrics[f"soft_clip_fraction_{sign}"]]}
    aux = expect["aux"][0]["actor/pg_clipfrac"] if isinstance(expect["aux"][0], dict) else expect["aux"]
    if name.startswith("aspo"):
        if name != "aspo_entropy_split":
            ratio = (inputs["logprobs"] - inputs["old_logprobs"]).exp()
            idle = (mask & (inputs["advantages"] == 0) & (ratio > 1 + config.clip_high)).sum().item()
            assert hard["pos"] + idle == pytest.approx(aux[0] * mask.sum().item())
        assert hard["neg"] == pytest.approx(aux[1] * mask.sum().item())
        assert (soft["neg"], soft["pos"]) == pytest.approx(aux[2:])
    elif name == "ppo_dualclip":
        assert hard["pos"] + hard["neg"] == pytest.approx((aux[0] + aux[2]) * mask.sum().item())
    elif name == "gspo":
        assert hard["pos"] + hard["neg"] == pytest.approx(aux * mask.sum().item())


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case['seed']}-{name}") for case in MORE_VECTORS for name in case["expect"]],
)
def test_vectors_of_more_objectives(case: dict[str, Any], name: str) -> None:
    inputs = {case["seed"]: case for case in VECTORS}.get(case["seed"], case)
    expect = case["expect"][name]
    out, gradient, _ = differentiate(_vector_inputs(inputs), _vector_config(name, expect["params"]))
    if "loss" in expect:
        assert out.loss_sum.item() / out.denominator.item() == pytest.approx(expect["loss"], rel=1e-8)
    torch.testing.assert_close(gradient / out.denominator, tensor64(expect["dloss_dlogprobs"]), rtol=1e-8, atol=1e-10)


# --- Against the table of the specification, in plain Python ---

LOW, HIGH, WIDE, C = 0.2, 0.3, 4.0, 3.0


def both_sides(*edges: float) -> list[float]:
    return [edge * side for edge in edges for side in (1 - 1e-6, 1 + 1e-6)]


EXTREME = [math.exp(log_ratio) for log_ratio in (-25, -19, 19, 25)]
RATIOS = [*both_sides(1 - LOW, 1 + HIGH, 1 / C, C), 0.05, 0.5, 0.9, 1.0, 1.1, 2.0, 6.0, *EXTREME]


@pytest.mark.parametrize("dual_clip", [C, None])
@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_table_at_every_boundary(objective: str, advantage: float, dual_clip: float | None) -> None:
    narrow, beyond_the_dual_clip = ((HIGH, r) for r in RATIOS), ((WIDE, r) for r in both_sides(C, 1 + WIDE))
    for i, (high, ratio) in enumerate([*narrow, *beyond_the_dual_clip]):
        config = config_of(objective, clip_low=LOW, clip_high=high, dual_clip=dual_clip)
        old = -0.3 - 0.1 * i
        logprob = old + math.log(ratio)
        inputs = {"logprobs": tensor64([logprob]), "old_logprobs": tensor64([old])}
        inputs |= {"advantages": tensor64([advantage]), "loss_mask": torch.tensor([True])}
        out, gradient, _ = differentiate(inputs, config)
        response = [(logprob, old, advantage)]
        ((weight, value),) = scalar_terms(objective, response, [LOW], [high], dual_clip)
        assert out.loss_sum.item() == pytest.approx(value, rel=1e-12), ratio
        assert gradient.item() == pytest.approx(-weight * advantage, rel=1e-12), ratio


def _scalar_rows(inputs: dict[str, Any], config: PolicyLossConfig) -> list[list[tuple[int, float, float]]]:
    """For every row: (position, weight * advantage, value) of its unmasked tokens."""
    rows: list[list[tuple[int, float, float]]] = []
    for row, mask in enumerate(inputs["loss_mask"]):
        positions = mask.nonzero()[:, 0].tolist()
        response = [
            tuple(inputs[name][row, t].item() for name in ("logprobs", "old_logprobs", "advantages")) for t in positions
        ]
        entropy = [inputs["entropy"][row, t].item() for t in positions]
        terms = response_terms(config, response, entropy)
        rows.append([(t, w * x[2], v) for t, x, (w, v) in zip(positions, response, terms, strict=True)])
    return rows


def _reduce(values: list[float], aggregation: str, norm_length: int) -> float:
    if aggregation == "seq-mean-token-mean":
        return sum(values) / len(values)
    return sum(values) / (norm_length if aggregation == "seq-mean-token-sum-norm" else 1)


@pytest.mark.parametrize("entropy_quantile", [None, 0.6])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_against_loops(objective: str, aggregation: str, entropy_quantile: float | None) -> None:
    """Values, gradients and denominators of rows. The same tokens packed into one stream give the same results."""
    config = config_of(objective, aggregation=aggregation, entropy_quantile=entropy_quantile)
    inputs = random_batch(7, 9)
    inputs["loss_mask"][3] = False  # a response without a token
    rows = _scalar_rows(inputs, config)
    full = [row for row in rows if row]
    expected = sum(_reduce([v for _, _, v in row], aggregation, 7) for row in full)
    expected_gradient = torch.zeros(7, 9, dtype=torch.float64)
    for i, row in enumerate(rows):
        for t, weighted, _ in row:
            scale = {"seq-mean-token-mean": len(row), "seq-mean-token-sum-norm": 7}.get(aggregation, 1)
            expected_gradient[i, t] = -weighted / scale

    out, gradient, _ = differentiate(inputs, config)
    assert out.loss_sum.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert out.denominator.item() == (sum(map(len, rows)) if aggregation == "token-mean" else 6)

    # One stream: interleaved tokens of all rows; ids with gaps, and unused ids in masked slots.
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1))
    packed = {name: values.flatten()[order] for name, values in inputs.items()}
    ids = (10 + 3 * torch.arange(7))[:, None].expand(7, 9).flatten()[order]
    packed["sequence_ids"] = torch.where(packed["loss_mask"], ids, 1 << 40)
    stream, stream_gradient, _ = differentiate(packed, config)
    assert stream.loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(stream.denominator, out.denominator)
    torch.testing.assert_close(stream_gradient, expected_gradient.flatten()[order], rtol=1e-12, atol=1e-15)


# --- Properties of all objectives ---

EVERYTHING: dict[str, Any] = {"entropy_quantile": 0.5, "kl_coef": 0.1, "entropy_coef": 0.02}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up(objective: str, aggregation: str) -> None:
    config = config_of(objective, aggregation=aggregation, **EVERYTHING)
    inputs = random_batch(6, 8)
    whole, whole_gradient, _ = differentiate(inputs, config)
    parts = [
        differentiate({name: values[rows] for name, values in inputs.items()}, config)
        for rows in (slice(0, 2), slice(2, 5), slice(5, 6))
    ]
    assert sum(out.loss_sum.item() for out, _, _ in parts) == pytest.approx(whole.loss_sum.item(), rel=1e-12)
    assert sum(out.denominator.item() for out, _, _ in parts) == whole.denominator.item()
    torch.testing.assert_close(torch.cat([g for _, g, _ in parts]), whole_gradient, rtol=1e-12, atol=1e-15)
    for name, (total, count) in numbers(whole.metrics).items():
        summed = [sum(pair) for pair in zip(*(numbers(out.metrics)[name] for out, _, _ in parts), strict=True)]
        assert summed == pytest.approx([total, count], rel=1e-12), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_slots_may_hold_anything(objective: str, poison: float) -> None:
    config = config_of(objective, aggregation="seq-mean-token-mean", **EVERYTHING)
    inputs = random_batch(7, 9) | {"sequence_ids": torch.arange(7)[:, None].repeat(1, 9)}
    clean, gradient, entropy_gradient = differentiate(inputs, config)
    assert torch.isfinite(clean.loss_sum)
    masked = ~inputs["loss_mask"]
    assert gradient[masked].eq(0).all()
    assert entropy_gradient[masked].eq(0).all()
    for name in set(inputs) - {"loss_mask"}:
        value = 3 if name == "sequence_ids" else poison
        out, g, h = differentiate(inputs | {name: inputs[name].masked_fill(masked, value)}, config)
        assert out.loss_sum.item() == clean.loss_sum.item(), name
        assert out.denominator.item() == clean.denominator.item(), name
        assert torch.equal(g, gradient), name
        assert torch.equal(h, entropy_gradient), name
        assert numbers(out.metrics) == numbers(clean.metrics), name


@pytest.mark.parametrize(
    "as_mask",
    [Tensor.int, Tensor.long, Tensor.byte, Tensor.float, lambda mask: mask * 0.25, lambda mask: mask * -3],
    ids=["int32", "int64", "uint8", "float32", "fractions", "negative"],
)
def test_any_non_zero_mask_is_the_boolean_one(as_mask: Callable[[Tensor], Tensor]) -> None:
    config = config_of("aspo", **EVERYTHING)
    inputs = random_batch(5, 6)
    expected, expected_gradient, _ = differentiate(inputs, config)
    out, gradient, _ = differentiate(inputs | {"loss_mask": as_mask(inputs["loss_mask"])}, config)
    assert out.loss_sum.item() == expected.loss_sum.item()
    assert torch.equal(gradient, expected_gradient)
    assert numbers(out.metrics) == numbers(expected.metrics)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_tokens(objective: str, shape: tuple[int, ...]) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "entropy", "ref_logprobs", "rollout_logprobs")
    inputs: dict[str, Any] = {name: torch.full(shape, -1.0) for name in names}
    inputs["loss_mask"] = torch.zeros(shape, dtype=torch.bool)
    for aggregation in AGGREGATIONS:
        for sequence_ids in (None, torch.zeros(shape, dtype=torch.long)):
            config = config_of(objective, aggregation=aggregation, **EVERYTHING)
            out, *gradients = differentiate(inputs | {"sequence_ids": sequence_ids}, config)
            assert out.loss_sum.item() == out.denominator.item() == 0
            for gradient in gradients:  # there is one: the graph is connected
                assert torch.equal(gradient, torch.zeros(shape))
            assert set(numbers(out.metrics).values()) == {(0.0, 0.0)}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_the_policy_is_differentiated(objective: str) -> None:
    others = ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    inputs = random_batch(4, 6)
    for name in ("logprobs", "entropy", *others):
        inputs[name].requires_grad_()
    out = policy_loss(**inputs, config=config_of(objective, rollout_correction="truncate", **EVERYTHING))
    out.loss_sum.backward()
    assert [inputs[name].grad for name in others] == [None] * len(others)
    assert not any(value.requires_grad for pair in out.metrics.values() for value in pair)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dual_clip", [3.0, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_ratios_stay_finite_in_float32(objective: str, dual_clip: float | None, estimator: str) -> None:
    distance = torch.tensor([25.0, -25.0, 88.0, -120.0])
    inputs = {"logprobs": -130.0 + distance, "old_logprobs": torch.full((4,), -130.0)}
    inputs |= {"ref_logprobs": inputs["logprobs"] - distance.flip(0), "loss_mask": torch.ones(4)}
    inputs |= {"rollout_logprobs": inputs["logprobs"], "entropy": torch.arange(4.0)}
    for advantage in (1.5, -1.5):
        inputs["advantages"] = torch.full((4,), advantage)
        config = config_of(objective, dual_clip=dual_clip, kl_estimator=estimator, **EVERYTHING)
        out, gradient, _ = differentiate(inputs, config)
        assert torch.isfinite(out.loss_sum)
        assert torch.isfinite(gradient).all()
        for name, pair in numbers(out.metrics).items():
            assert all(map(math.isfinite, pair)), name
    if objective == "aspo" and dual_clip:  # advantage < 0: r > c, r < 1 - low, twice
        kl_gradient = {"k1": torch.ones(4), "k2": distance.flip(0)}
        kl_gradient["k3"] = 1 - (-distance.flip(0)).clamp(max=20).exp()
        expected = tensor64([4.5, 0, 4.5, 0]) + 0.1 * kl_gradient[estimator]
        torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_excluded_token_spoils_nothing(objective: str, estimator: str) -> None:
    """Top-k and top-p give excluded tokens log-prob -inf under the current policy, the old one, or both."""
    inf = math.inf
    inputs = {"logprobs": tensor64([-1, -2, -inf, -1.5, -inf]), "old_logprobs": tensor64([-1.1, -1.9, -inf, -inf, -1])}
    inputs |= {"ref_logprobs": tensor64([-1, -1, -1, -1, -inf]), "rollout_logprobs": inputs["old_logprobs"]}
    inputs |= {"advantages": tensor64([1, 1, 1, 1, 1]), "loss_mask": torch.ones(5), "entropy": tensor64(range(5))}
    for advantage in (1.0, -1.0):
        inputs["advantages"] = torch.full((5,), advantage, dtype=torch.float64)
        out, gradient, _ = differentiate(inputs, config_of(objective, kl_estimator=estimator, **EVERYTHING))
        assert torch.isfinite(gradient).all()
        assert all(math.isfinite(x) for pair in numbers(out.metrics).values() for x in pair)
        if objective not in SEQUENCE_WISE:
            finite = {name: values[:2] for name, values in inputs.items()}
            _, expected, _ = differentiate(finite, config_of(objective, kl_estimator=estimator, **EVERYTHING))
            torch.testing.assert_close(gradient[:2], expected)


# --- Additional terms ---


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_kl_estimators(estimator: str, value: Callable[[float], float], slope: Callable[[float], float]) -> None:
    """With A = 0 the loss is the KL term alone, whose gradient can be checked by finite differences."""
    inputs = random_batch(3, 5) | {"advantages": torch.zeros(3, 5, dtype=torch.float64)}
    config = config_of("aspo", kl_coef=0.3, kl_estimator=estimator)
    out, gradient, _ = differentiate(inputs, config)
    positions = inputs["loss_mask"].nonzero().tolist()
    distances = {(i, t): (inputs["logprobs"] - inputs["ref_logprobs"])[i, t].item() for i, t in positions}
    total = sum(map(value, distances.values()))
    assert out.loss_sum.item() == pytest.approx(0.3 * total, rel=1e-12)
    assert numbers(out.metrics)["kl"] == pytest.approx((total, len(positions)), rel=1e-12)
    for (i, t), d in distances.items():
        step = torch.zeros(3, 5, dtype=torch.float64)
        step[i, t] = 1e-6
        up, down = (
            differentiate(inputs | {"logprobs": inputs["logprobs"] + s}, config)[0].loss_sum.item()
            for s in (step, -step)
        )
        assert gradient[i, t].item() == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-9)
        assert gradient[i, t].item() == pytest.approx(0.3 * slope(d), rel=1e-12)


def test_reference_without_coefficient_is_only_reported() -> None:
    inputs = random_batch(3, 5)
    with_reference, gradient, _ = differentiate(inputs, config_of("aspo"))
    without, plain_gradient, _ = differentiate(inputs | {"ref_logprobs": None}, config_of("aspo"))
    assert with_reference.loss_sum.item() == without.loss_sum.item()
    assert torch.equal(gradient, plain_gradient)
    assert set(with_reference.metrics) - set(without.metrics) == {"kl", "kl_pos", "kl_neg"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kl_on_low_entropy_tokens_only(objective: str) -> None:
    inputs = random_batch(5, 9)
    q = {"entropy_quantile": 0.6}
    plain, gradient, _ = differentiate(inputs, config_of(objective, **q))
    _, everywhere, _ = differentiate(inputs, config_of(objective, kl_coef=0.3, **q))
    out, low, _ = differentiate(inputs, config_of(objective, kl_coef=0.3, kl_tokens="low_entropy", **q))
    mask, entropy, d = inputs["loss_mask"], inputs["entropy"], inputs["logprobs"] - inputs["ref_logprobs"]
    expected = 0.0
    for row in range(5):
        limit = torch.quantile(entropy[row][mask[row]], 0.6) if mask[row].any() else 0.0
        for column in range(9):
            has_kl = bool(mask[row, column]) and bool(entropy[row, column] <= limit)
            assert low[row, column] == (everywhere if has_kl else gradient)[row, column]
            expected += 0.3 * (torch.exp(-d[row, column]) - 1 + d[row, column]).item() if has_kl else 0.0
    assert out.loss_sum.item() - plain.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_entropy_bonus(aggregation: str) -> None:
    inputs = random_batch(4, 6)
    mask, lengths = inputs["loss_mask"], inputs["loss_mask"].sum(1, keepdim=True).double()
    plain, _, _ = differentiate(inputs, config_of("aspo", aggregation=aggregation))
    out, _, gradient = differentiate(inputs, config_of("aspo", aggregation=aggregation, entropy_coef=0.05))
    weight = mask / (lengths if aggregation == "seq-mean-token-mean" else 1)
    bonus = (weight * inputs["entropy"]).sum().item()
    assert out.loss_sum.item() == pytest.approx(plain.loss_sum.item() - 0.05 * bonus, rel=1e-12)
    torch.testing.assert_close(gradient, -0.05 * weight.double())
    mean_entropy = inputs["entropy"][mask].sum().item(), mask.sum().item()
    assert numbers(out.metrics)["entropy"] == pytest.approx(mean_entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.8, 0.999, 1.0])
def test_quantile_is_torchs(q: float, dtype: torch.dtype) -> None:
    inputs = random_batch(9, 21, seed=3, dtype=dtype)
    values, mask = inputs["entropy"], inputs["loss_mask"]
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(2))
    ids = torch.arange(9)[:, None].expand_as(mask).flatten()[order]
    responses, whole = Responses.from_ids(mask.flatten()[order], ids, None, {"values": values.flatten()[order]})
    found = responses.spread(responses.quantile(whole["values"], q))
    for row in range(9):
        expected = torch.quantile(values[row][mask[row]], q).expand(21)
        torch.testing.assert_close(found[ids == row], expected, rtol=1e-6, atol=0, check_dtype=False)


def test_metrics_by_hand() -> None:
    ratios = [0.25, 0.5, 1.5, 0.5, 1.0, 4.0, 2.0, 8.0]
    advantages = [2.0, 2.0, 2.0, -1.0, -1.0, -1.0, 0.0, 2.0]
    old = [-1.0] * 8
    inputs = {"old_logprobs": tensor64(old), "advantages": tensor64(advantages)}
    inputs["logprobs"] = tensor64([-1.0 + math.log(r) for r in ratios])
    inputs["loss_mask"] = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0])
    inputs["rollout_logprobs"] = inputs["old_logprobs"] - tensor64([0.5, -0.5, 0, 0, 0, 0, 0, 9])
    out, _, _ = differentiate(inputs, config_of("aspo"))
    expected = {
        "ratio_pos": (0.25 + 0.5 + 1.5, 3),
        "ratio_neg": (0.5 + 1.0 + 4.0, 3),
        "weight_pos": (3 + 2 + 0, 3),
        "weight_neg": (0 + 1 + 3, 3),
        "clip_fraction_pos": (1, 3),
        "clip_fraction_neg": (1, 3),
        "soft_clip_fraction_pos": (1, 3),
        "soft_clip_fraction_neg": (1, 3),
        "value": (out.loss_sum.item(), 7),
    }
    by_token = {
        "approx_kl": [r - 1 - math.log(r) for r in ratios[:7]],
        "nll": [1 - math.log(r) for r in ratios[:7]],
        "rollout_logprob_diff": [0.5, 0.5, 0, 0, 0, 0, 0],
        # d = rollout - old = -+0.5
        "rollout_kl": [math.exp(0.5) - 1 - 0.5, math.exp(-0.5) - 1 + 0.5, 0, 0, 0, 0, 0],
        "rollout_ratio": [math.exp(0.5), math.exp(-0.5), 1, 1, 1, 1, 1],
        "rollout_cut": [0] * 7,
        "rollout_dropped": [0] * 7,
    }
    for name, values in by_token.items():
        positive = [v for v, a in zip(values, advantages, strict=False) if a > 0]
        negative = [v for v, a in zip(values, advantages, strict=False) if a < 0]
        expected |= {name: (sum(values), 7), f"{name}_pos": (sum(positive), 3), f"{name}_neg": (sum(negative), 3)}
    assert {name: value.item() for name, value in out.maxima.items()} == {
        "log_ratio_max": pytest.approx(math.log(4)),
        "rollout_ratio_max": pytest.approx(math.exp(0.5)),
    }
    assert numbers(out.metrics) == {name: pytest.approx(pair) for name, pair in expected.items()}
    by_hand = -3 * 2 * inputs["logprobs"][0].item() - 2 / 0.5 - 2 / 1.2 + 0.8 + 1 + 3 * inputs["logprobs"][5].item()
    assert out.loss_sum.item() == pytest.approx(by_hand)


@pytest.mark.parametrize(("ratio", "clipped"), [(0.79, 1), (0.81, 0), (1.29, 0), (1.31, 1)])
def test_cispo_counts_held_ratios(ratio: float, clipped: int) -> None:
    inputs = {"logprobs": tensor64([math.log(ratio)]), "old_logprobs": tensor64([0.0])}
    inputs |= {"advantages": tensor64([1.0]), "loss_mask": torch.tensor([1])}
    out, _, _ = differentiate(inputs, config_of("cispo", clip_high=0.3))
    assert numbers(out.metrics)["clip_fraction_pos"] == (clipped, 1)


def weights(objective: str, dual_clip: float, clip: float) -> Tensor:
    """On ratios from e^-5 to e^5 with both signs of the advantage, of tokens with probability 0.5."""
    ratio = torch.linspace(-5, 5, 41, dtype=torch.float64).exp().repeat(2)
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(41)
    x = [torch.full_like(ratio, value) for value in (math.log(0.5), clip)]
    found, config = find_objective(PolicyLossConfig(objective=objective, dual_clip=dual_clip))
    return token_terms(found, TokenInputs(x[0], ratio, advantages, x[1], x[1], ratio), config).weight


@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_objectives_without_a_cap_or_a_clip_range(objective: str) -> None:
    usual = weights(objective, 1.5, 0.2)
    assert torch.equal(usual, weights(objective, 100.0, 0.2)) == (objective in WITHOUT_CAP)
    assert torch.equal(usual, weights(objective, 1.5, 0.7)) == (objective in WITHOUT_RANGE)
