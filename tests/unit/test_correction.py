"""The train/rollout correction against plain Python, response by response."""

import math
from typing import Any, get_args

import pytest
import torch
from scalar_losses import differentiate, numbers, response_terms, rollout_factors

from megatron_aspo.config.loss import ObjectiveName, PolicyLossConfig

LOW, HIGH = 0.5, 2.0
RATIOS = [  # rho = pi_old / pi_rollout of every token of four responses; the last is masked
    [0.49, 0.51, 1.0, 1.99, 2.01],
    [1.1, 0.9, 1.2, 1.05, 1.0],
    [0.02, 3.0, 4.0, 2.5, 2.2],
    [7.0, 8.0, 9.0, 5.0, 6.0],
]
ADVANTAGES = [1.5, -0.7, -1.1, 2.0]


def make_batch() -> dict[str, Any]:
    """Ratios to the old policy on both sides of the clips; every third token is masked."""
    generator = torch.Generator().manual_seed(0)
    rho = torch.tensor(RATIOS, dtype=torch.float64)
    old = -1 - torch.rand(rho.shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(20).view(4, 5) % 3 != 0
    mask[3] = False
    return {
        "logprobs": old + torch.randn(rho.shape, generator=generator, dtype=torch.float64) / 3,
        "old_logprobs": old,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None].expand(4, 5).clone(),
        "loss_mask": mask,
        "entropy": torch.rand(rho.shape, generator=generator, dtype=torch.float64),
        "ref_logprobs": old + torch.randn(rho.shape, generator=generator, dtype=torch.float64) / 3,
        "rollout_logprobs": old - rho.log(),
    }


def positions(batch: dict[str, Any], row: int) -> list[int]:
    return batch["loss_mask"][row].nonzero()[:, 0].tolist()


SETTINGS: list[dict[str, Any]] = [
    {"kind": "truncate"},
    {"kind": "mask"},
    {"kind": "none", "band": (0.9, None)},
    {"kind": "none", "band": (None, 1.2)},
    {"kind": "truncate", "band": (0.99, 1.3)},
    {"kind": "mask", "band": (0.1, 1.15)},
    {"kind": "none", "veto": 0.1},
    {"kind": "truncate", "veto": 0.52},
    {"kind": "mask", "veto": 1e-4, "band": (None, 3.0)},
    {"kind": "truncate", "veto": 0.1, "band": (None, 1.1)},
]


def config_of(kind: str, band: tuple[Any, Any] = (None, None), veto: float | None = None, **rest: Any) -> Any:
    fields: dict[str, Any] = {"dual_clip": 3.0, "rollout_correction": kind}
    fields |= {"rollout_ratio_low": LOW, "rollout_ratio_high": HIGH}
    fields |= {"rollout_sequence_low": band[0], "rollout_sequence_high": band[1], "rollout_veto": veto}
    return PolicyLossConfig(**fields | rest)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("objective", get_args(ObjectiveName))
def test_the_policy_gradient_times_rho_by_hand(objective: str, setting: dict[str, Any]) -> None:
    batch, config = make_batch(), config_of(**setting, objective=objective)
    out, gradient, _ = differentiate(batch, config)
    expected, value = torch.zeros(4, 5, dtype=torch.float64), 0.0
    cuts = drops = rho_sum = tokens = 0.0
    seen = []
    for row in range(3):  # the fourth has no token
        at = positions(batch, row)
        rhos = [RATIOS[row][t] for t in at]
        factors, cut, dropped = rollout_factors(rhos, config)
        columns = (batch["logprobs"], batch["old_logprobs"], batch["advantages"])
        response: Any = [tuple(column[row, t].item() for column in columns) for t in at]
        terms = response_terms(config, response)
        for t, factor, (weight, token_value) in zip(at, factors, terms, strict=True):
            expected[row, t] = -factor * weight * ADVANTAGES[row]
            value += factor * token_value
        cuts, drops, rho_sum = cuts + sum(cut), drops + dropped * len(at), rho_sum + sum(rhos)
        tokens += len(at)
        seen += rhos
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert out.loss_sum.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert out.denominator.item() == tokens == batch["loss_mask"].sum().item()
    # k3 of KL(rollout || old), from samples of the rollout: rho - 1 - log rho.
    k3 = sum(r - 1 - math.log(r) for r in seen)
    sums = {"rollout_ratio": rho_sum, "rollout_cut": cuts, "rollout_dropped": drops, "rollout_kl": k3}
    found = numbers(out.metrics)
    for name, total in sums.items():
        assert found[name] == pytest.approx((total, tokens)), name
    assert float(out.maxima["rollout_ratio_max"]) == pytest.approx(max(seen))


def test_the_settings_cut_and_drop() -> None:
    """The settings of the test above cover every case."""
    results = []
    for setting in SETTINGS:
        rhos = [[RATIOS[row][t] for t in positions(make_batch(), row)] for row in range(3)]
        rows = [rollout_factors(row, config_of(**setting)) for row in rhos]
        results.append((sum(sum(cut) for _, cut, _ in rows), [dropped for *_, dropped in rows]))
    assert [cut for cut, _ in results] == [4, 5, 0, 0, 4, 5, 0, 4, 5, 4]
    none, third = [False] * 3, [False, False, True]
    assert [dropped for _, dropped in results[:6]] == [none, none, third, none, third, none]
    assert [dropped for _, dropped in results[6:]] == [third, [True, False, True], none, [False, True, True]]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_only_the_policy_gradient_is_corrected(setting: dict[str, Any]) -> None:
    """KL and entropy terms, and all denominators, are those without correction."""
    batch = make_batch()
    for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        extra: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.2, "aggregation": aggregation}
        both, both_gradient, both_entropy = differentiate(batch, config_of(**setting, **extra))
        alone, alone_gradient, _ = differentiate(batch, config_of(**setting, aggregation=aggregation))
        plain, plain_gradient, plain_entropy = differentiate(batch, PolicyLossConfig(**extra))
        bare, bare_gradient, _ = differentiate(batch, PolicyLossConfig(aggregation=aggregation))
        torch.testing.assert_close(
            both_gradient - alone_gradient, plain_gradient - bare_gradient, rtol=1e-10, atol=1e-13
        )
        difference = (both.loss_sum - alone.loss_sum).item()
        assert difference == pytest.approx((plain.loss_sum - bare.loss_sum).item(), rel=1e-10)
        assert torch.equal(both_entropy, plain_entropy)
        assert torch.equal(both.denominator, bare.denominator)
        unlike = {
            n.removesuffix("_pos").removesuffix("_neg")
            for n in plain.metrics
            if plain.metrics[n][0] != both.metrics[n][0]
        }
        assert unlike <= {"value", "rollout_cut", "rollout_dropped"}


def test_masked_tokens_neither_veto_nor_count() -> None:
    batch, config = make_batch(), config_of("truncate", (0.9, 1.3), 0.3)
    right, right_gradient, _ = differentiate(batch, config)
    for garbage in (math.nan, math.inf, -math.inf, -1e30):
        rollout = batch["rollout_logprobs"].masked_fill(~batch["loss_mask"], garbage)
        out, gradient, _ = differentiate(batch | {"rollout_logprobs": rollout}, config)
        assert out.loss_sum.item() == right.loss_sum.item()
        assert torch.equal(gradient, right_gradient)
        assert numbers(out.metrics) == numbers(right.metrics)
        assert torch.equal(out.maxima["rollout_ratio_max"], right.maxima["rollout_ratio_max"])


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_extreme_mismatch_stays_finite(log_ratio: float) -> None:
    batch = make_batch()
    batch["rollout_logprobs"][0, 1] = batch["old_logprobs"][0, 1] - log_ratio
    for kind, factor in (("truncate", HIGH if log_ratio > 0 else math.exp(-20)), ("mask", 0.0)):
        out, gradient, _ = differentiate(batch, config_of(kind))
        plain = differentiate(batch, PolicyLossConfig())[1]
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(out.loss_sum)
        assert gradient[0, 1].item() == pytest.approx(factor * plain[0, 1].item())
    out, gradient, _ = differentiate(batch, config_of("none", (0.01, 100.0)))
    assert gradient[0].eq(0).all()
    assert torch.isfinite(out.loss_sum)


@pytest.mark.parametrize(
    "setting",
    [{"kind": "mask"}, {"kind": "truncate"}, {"kind": "none", "veto": 0.1}, {"kind": "none", "band": (0.01, 100.0)}],
)
@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_a_token_without_a_sampler_logprob_is_left_out(setting: dict[str, Any], missing: float) -> None:
    batch = make_batch()
    right = differentiate(batch, config_of(**setting))[1]
    batch["rollout_logprobs"][0, 1] = missing
    out, gradient, _ = differentiate(batch, config_of(**setting))
    assert abs(gradient[0, 1].item()) < 1e-8  # ratio e^-20
    dropped = setting["kind"] == "none"
    assert numbers(out.metrics)["rollout_dropped" if dropped else "rollout_ratio"][0] > 0
    torch.testing.assert_close(gradient[1:], right[1:], rtol=0, atol=0)
    assert gradient[0].eq(0).all() if dropped else torch.equal(gradient[0, 2:], right[0, 2:])
    assert math.isfinite(out.loss_sum)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_sampler_that_agrees_changes_nothing(kind: str) -> None:
    batch = make_batch()
    batch["rollout_logprobs"] = batch["old_logprobs"].clone()
    out, gradient, _ = differentiate(batch, config_of(kind, (0.99, 1.01), 0.9))
    plain, plain_gradient, _ = differentiate(batch, PolicyLossConfig())
    assert torch.equal(gradient, plain_gradient)
    assert out.loss_sum.item() == plain.loss_sum.item()
    assert numbers(out.metrics) == numbers(plain.metrics)
