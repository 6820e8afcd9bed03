"""The importance ratio anchored at the sampler, pi / pi_rollout, against plain Python, response by response."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from scalar_losses import differentiate, numbers, response_terms

from megatron_aspo.config.checks import check_together
from megatron_aspo.config.loss import ObjectiveName, PolicyLossConfig
from megatron_aspo.config.model import ModelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.errors import UserError

OBJECTIVES = get_args(ObjectiveName)
ADVANTAGES = [1.5, -0.7, -1.1, 2.0]
BAND = (0.4, 2.5)


def make_batch() -> dict[str, Any]:
    """Log-ratios to the sampler from -1.9 to 1.9 with both signs of the advantage; every third token is masked."""
    generator = torch.Generator().manual_seed(1)
    rollout = -1 - torch.rand(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(20).view(4, 5) % 3 != 0
    return {
        "logprobs": rollout + torch.linspace(-1.9, 1.9, 20, dtype=torch.float64).view(5, 4).T,
        "old_logprobs": None,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None].expand(4, 5).clone(),
        "loss_mask": mask,
        "entropy": torch.rand(rollout.shape, generator=generator, dtype=torch.float64),
        "rollout_logprobs": rollout,
    }


def expected(batch: dict[str, Any], config: PolicyLossConfig) -> tuple[torch.Tensor, float, float, float]:
    """Gradient, loss sum, tokens outside the band, tokens; from scalars."""
    gradient, value, cut, tokens = torch.zeros(4, 5, dtype=torch.float64), 0.0, 0.0, 0.0
    low, high = config.anchor_band or (0.0, math.inf)
    for row in range(4):
        at = batch["loss_mask"][row].nonzero()[:, 0].tolist()
        columns = [batch[name][row].tolist() for name in ("logprobs", "rollout_logprobs", "advantages")]
        response: Any = [tuple(column[t] for column in columns) for t in at]
        for t, (now, then, advantage), (w, token_value) in zip(
            at, response, response_terms(config, response), strict=True
        ):
            inside = low <= math.exp(now - then) <= high
            gradient[row, t] = -w * advantage * inside
            value, cut, tokens = value + token_value * inside, cut + (not inside), tokens + 1
    return gradient, value, cut, tokens


@pytest.mark.parametrize("band", [None, BAND], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_and_value_by_hand(objective: str, band: Any) -> None:
    batch, config = make_batch(), PolicyLossConfig(objective=objective, anchor="rollout", anchor_band=band)
    out, gradient, _ = differentiate(batch, config)
    right, value, cut, tokens = expected(batch, config)
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-14)
    assert out.loss_sum.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert out.denominator.item() == tokens
    if band is None:
        assert "anchor_cut" not in out.metrics
    else:
        assert cut >= 4
        assert numbers(out.metrics)["anchor_cut"] == (cut, tokens)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_old_logprobs_are_only_reported(objective: str) -> None:
    """Known old log-probs change no gradient. They part log r into the updates' share and the sampler's."""
    batch, config = make_batch(), PolicyLossConfig(objective=objective, anchor="rollout", anchor_band=BAND)
    old = batch["rollout_logprobs"] + 0.3 * torch.sin(torch.arange(20.0, dtype=torch.float64)).view(4, 5)
    out, gradient, _ = differentiate(batch, config)
    known, same_gradient, _ = differentiate(batch | {"old_logprobs": old}, config)
    assert torch.equal(gradient, same_gradient)
    assert torch.equal(out.loss_sum, known.loss_sum)
    found, mask = numbers(known.metrics), batch["loss_mask"]
    assert all(found[name] == pair for name, pair in numbers(out.metrics).items())
    for name, difference in (
        ("update_logprob_diff", batch["logprobs"] - old),
        ("rollout_logprob_diff", old - batch["rollout_logprobs"]),
    ):
        assert found[name] == pytest.approx((difference[mask].abs().sum().item(), mask.sum().item()), rel=1e-12)
        assert name not in out.metrics


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_anchor_at_the_old_policy_is_the_usual_loss(objective: str) -> None:
    batch = make_batch()
    usual, usual_gradient, _ = differentiate(
        batch | {"old_logprobs": batch["rollout_logprobs"], "rollout_logprobs": None}, PolicyLossConfig(objective)
    )
    anchored, gradient, _ = differentiate(batch, PolicyLossConfig(objective, anchor="rollout"))
    assert torch.equal(gradient, usual_gradient)
    assert torch.equal(anchored.loss_sum, usual.loss_sum)
    assert {name: float(total) for name, (total, _) in anchored.metrics.items()} == {
        name: float(total) for name, (total, _) in usual.metrics.items()
    }
    assert anchored.maxima == usual.maxima


def test_masked_sampler_logprobs_may_be_anything() -> None:
    batch, config = make_batch(), PolicyLossConfig(anchor="rollout", anchor_band=BAND)
    _, right, _ = differentiate(batch, config)
    for garbage in (math.nan, math.inf, -math.inf):
        rollout = batch["rollout_logprobs"].masked_fill(~batch["loss_mask"], garbage)
        _, gradient, _ = differentiate(batch | {"rollout_logprobs": rollout}, config)
        assert torch.equal(gradient, right)


@pytest.mark.parametrize(
    ("bad", "band"),
    [(-30.0, BAND), *((bad, band) for bad in (-math.inf, math.inf, math.nan) for band in (BAND, (0.0, 5.0), None))],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_token_that_is_left_out_changes_no_other_tokens_gradient(
    objective: str, advantage: float, bad: float, band: Any
) -> None:
    batch, config = make_batch(), PolicyLossConfig(objective=objective, anchor="rollout", anchor_band=band)
    batch["advantages"] = torch.full((4, 5), advantage, dtype=torch.float64)
    at = tuple(batch["loss_mask"].nonzero()[4].tolist())
    rollout, mask = batch["rollout_logprobs"].clone(), batch["loss_mask"].clone()
    rollout[at], mask[at] = bad, False
    out, gradient, _ = differentiate(batch | {"rollout_logprobs": rollout}, config)
    _, without, _ = differentiate(batch | {"loss_mask": mask}, config)
    assert gradient[at] == 0
    torch.testing.assert_close(gradient, without, rtol=1e-12, atol=1e-14)
    assert math.isfinite(out.loss_sum)


@pytest.mark.parametrize("missing", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("settings", [{"anchor": "rollout"}, {"rollout_correction": "truncate"}], ids=str)
def test_a_missing_logprob_is_in_no_metric_of_the_sampler(settings: dict[str, Any], missing: float) -> None:
    """The means are those of a token on which sampler and trainer agree."""
    batch, config = make_batch(), PolicyLossConfig(**settings)
    if config.corrects_rollout:
        batch["old_logprobs"] = batch["rollout_logprobs"] + 0.1
    trainer = batch["old_logprobs" if config.corrects_rollout else "logprobs"]
    found = []
    at = tuple(batch["loss_mask"].nonzero()[4].tolist())
    for logprob in (missing, trainer[at].item()):
        rollout = batch["rollout_logprobs"].clone()
        rollout[at] = logprob
        out, _, _ = differentiate(batch | {"rollout_logprobs": rollout}, config)
        means = numbers(out.metrics)
        names = [name for name in means if name.startswith(("approx_kl", "rollout_logprob_diff", "rollout_kl"))]
        found.append([means[name] for name in names] + [float(out.maxima["log_ratio_max"])])
    assert found[0] == found[1]
    assert len(found[0]) > 3


def test_a_token_that_became_impossible_is_outside_every_band() -> None:
    batch = make_batch()
    batch["logprobs"][0, 1] = -math.inf
    banded = PolicyLossConfig(anchor="rollout", anchor_band=(0.0, 2.5))
    for config, weight in ((banded, 3.0), (replace(banded, anchor_band=BAND), 0.0)):
        _, gradient, _ = differentiate(batch, config)
        assert gradient[0, 1] == -weight * 1.5


def test_a_token_outside_the_band_is_not_held_at_the_cap() -> None:
    batch, cap = make_batch(), PolicyLossConfig(anchor="rollout", anchor_band=(0.25, 4.0))
    ratio, mask = (batch["logprobs"] - batch["rollout_logprobs"]).exp(), batch["loss_mask"]
    positive = batch["advantages"] > 0
    held = torch.where(positive, ratio < 1 / 3, ratio > 3) & mask
    inside = held & (ratio >= 0.25) & (ratio <= 4)
    assert 0 < inside.sum() < held.sum()
    for config, tokens in ((replace(cap, anchor_band=None), held), (cap, inside)):
        found = numbers(differentiate(batch, config)[0].metrics)
        for name, of_sign in (("pos", positive), ("neg", ~positive)):
            assert found[f"soft_clip_fraction_{name}"][0] == (tokens & of_sign).sum()


def test_sampler_logprobs_are_required() -> None:
    batch = make_batch() | {"rollout_logprobs": None}
    with pytest.raises(ValueError, match=r"^rollout_logprobs is missing, .* needs it \(anchor=rollout\)$"):
        differentiate(batch, PolicyLossConfig(anchor="rollout"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": "sampler"}, "anchor='sampler' is not one of trainer, rollout"),
        ({"anchor_band": (0.5, 2.0)}, r"anchor_band=\(0.5, 2.0\) needs anchor=rollout"),
        *(
            ({"anchor": "rollout", "anchor_band": band}, r"anchor_band=.* must be \[low, high\] with 0 <= low < 1")
            for band in (
                5.0,
                (1.0, 2.0),
                (-0.1, 2.0),
                (0.5, 1.0),
                (0.5, math.inf),
                (0.5,),
                (0.5, 1.0, 2.0),
                (math.nan, 2.0),
            )
        ),
        *(
            ({"anchor": "rollout", **setting}, "acts on pi_old / pi_rollout, but with anchor=rollout no pass")
            for setting in (
                {"rollout_correction": "truncate"},
                {"rollout_correction": "mask"},
                {"rollout_sequence_low": 0.9},
                {"rollout_sequence_high": 1.1},
                {"rollout_veto": 0.1},
            )
        ),
    ],
    ids=str,
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{next(reversed(settings))}=.*{message.split('=', 1)[-1]}"):
        PolicyLossConfig(**settings)


def test_a_list_is_a_band() -> None:
    band: Any = [0.5, 2.0]
    assert PolicyLossConfig(anchor="rollout", anchor_band=band).anchor_band == (0.5, 2.0)


def test_router_replay_by_the_trainer_is_refused() -> None:
    config = RunConfig(
        name="moe",
        model=ModelConfig(num_experts=4, moe_top_k=2),
        train=TrainConfig(router_replay="trainer"),
        loss=PolicyLossConfig(anchor="rollout"),
    )
    with pytest.raises(UserError, match=r"^train.router_replay=trainer records .* loss.anchor=rollout leaves out; set"):
        check_together(config)
