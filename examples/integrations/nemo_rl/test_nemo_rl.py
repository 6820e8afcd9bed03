"""Tests the adapter against the installed NeMo-RL, or otherwise against its published interface."""

from __future__ import annotations

import argparse
import enum
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import Tensor

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
ROWS, TOKENS = 4, 7


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


# NVIDIA-NeMo/RL, nemo_rl/algorithms/loss: ClippedPGLossFn (loss_functions.py at
# 006907a9570734f3e5d484c08ada84b0b89224c9) has these parameters and reads these fields. The protocol LossFunction
# (interfaces.py at 002cdc27b8019eafc470f0aab22d4a7206d0de81) is called by keyword, as in the tests below. The values
# are the defaults of ClippedPGLossConfig.
PARAMETERS = ["self", "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks"]
INSTALLED = installed("nemo_rl.algorithms.loss")
FIELDS: dict[str, Any] = {
    "disable_ppo_ratio": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.01,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "force_on_policy_ratio": False,
    "sequence_level_importance_ratios": False,
    "positive_example_nll_weight": 0.0,
    "use_cispo": False,
    "token_level_loss": True,
}

# Recipe of the page's command, with the keys that the page names or the loss reads. Values are from the recipe or from
# examples/configs/grpo_math_1B.yaml, which it inherits, at faad805961e61e57f7662a3c94dba539367e833a.
RECIPE = "examples/configs/recipes/llm/grpo-qwen2.5-32b-32n8g-fsdp2tp8-actckpt.v3.yaml"
PUBLISHED: dict[str, Any] = {
    "grpo": {"num_prompts_per_step": 64, "num_generations_per_prompt": 32},
    "policy": {"train_global_batch_size": 512, "megatron_cfg": {"use_fused_linear_logprobs": False}},
    "loss_fn": FIELDS,
}


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


class ClippedPGLossConfig(SimpleNamespace):
    def __init__(self, **given: Any) -> None:
        super().__init__(**{**FIELDS, **given})


class ClippedPGLossFn:
    """Stand-in that stores the fields and returns the metrics that the trainer reads."""

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        for name in FIELDS:
            setattr(self, name, getattr(cfg, name))
        self.loss_type = LossType.TOKEN_LEVEL if cfg.token_level_loss else LossType.SEQUENCE_LEVEL
        self.metric_normalizations = {"loss": MetricNormalizer.TOKENS, "token_mult_prob_error": MetricNormalizer.TOKENS}

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        assert not torch.is_grad_enabled()
        return next_token_logprobs.sum(), {"loss": 1e9, "token_mult_prob_error": 1.01}


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interfaces: Any = ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType, interfaces.MetricNormalizer = LossType, MetricNormalizer
    functions: Any = ModuleType("nemo_rl.algorithms.loss.loss_functions")
    functions.ClippedPGLossFn, functions.ClippedPGLossConfig = ClippedPGLossFn, ClippedPGLossConfig
    for module in (interfaces, functions):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not INSTALLED:
        put_in_place(monkeypatch)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "nemo_rl_aspo", raising=False)
    return importlib.import_module("nemo_rl_aspo")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def config(**changes: Any) -> Any:
    """The default loss configuration without the KL penalty, whose default the adapter refuses."""
    functions = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    return functions.ClippedPGLossConfig(**{"reference_policy_kl_penalty": 0, **changes})


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Data [ROWS, TOKENS], whose first column is unused, and log-probs [ROWS, TOKENS - 1]."""
    draw = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(ROWS, TOKENS, generator=draw, dtype=torch.float64)

    data = {
        "token_mask": (torch.rand(ROWS, TOKENS, generator=draw) < 0.7).double(),
        "sample_mask": torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64),
        "advantages": normal()[:, :1].repeat(1, TOKENS),
        "prev_logprobs": normal() - 3,
        "generation_logprobs": normal() - 3,
    }
    data["token_mask"][:, 0] = 1  # a prompt token; the shift must drop it
    data["advantages"][:, 0] = 9
    logprobs = data["prev_logprobs"][:, 1:] + 0.7 * normal()[:, 1:]
    return data, logprobs.requires_grad_()


def by_definition(
    data: dict[str, Tensor], logprobs: Tensor, token_level: bool, anchor: str = "prev_logprobs", band: float = 1e9
) -> Tensor:
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] * data.get("curr_logprobs_keep_mask", 1)
    advantages = data["advantages"][:, 1:]
    r = (logprobs - data[anchor][:, 1:]).detach().exp()
    up = torch.where(r > 1.2, 0.0, (1 / r).clamp(max=3))
    down = torch.where(r < 0.8, 0.0, r.clamp(max=3))
    within = (1 / band <= r) & (r <= band)
    losses = -torch.where(advantages > 0, up, down) * within * advantages * logprobs * mask
    if token_level:
        loss = losses.sum() / mask.sum()
    else:
        loss = (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / (mask.sum(1) > 0).sum()
    return torch.autograd.grad(loss, logprobs)[0]


def test_the_parameters_are_those_of_the_class_that_is_replaced(adapter: Any) -> None:
    assert list(inspect.signature(adapter.ASPOLossFn.__call__).parameters) == PARAMETERS
    if INSTALLED:
        assert list(inspect.signature(adapter.ClippedPGLossFn.__call__).parameters) == PARAMETERS
        defaults = importlib.import_module("nemo_rl.algorithms.loss.loss_functions").ClippedPGLossConfig()
        assert {name: getattr(defaults, name) for name in FIELDS} == FIELDS
    assert set(adapter.REFUSED) <= set(FIELDS)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("token_level", [True, False])
def test_shares_of_micro_batches_add_up_to_aspo(adapter: Any, token_level: bool, filtered: bool) -> None:
    data, logprobs = batch()
    if filtered:
        data["curr_logprobs_keep_mask"] = (torch.arange(TOKENS - 1) != 2).double().expand(ROWS, -1)
    loss_fn = adapter.ASPOLossFn(config(token_level_loss=token_level))
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] * data.get("curr_logprobs_keep_mask", 1)
    total, clipped = torch.zeros(()), 0.0
    for rows in (slice(0, 1), slice(1, 2), slice(2, 4)):
        loss, metrics = loss_fn(
            data={name: value[rows] for name, value in data.items()},
            global_valid_seqs=(mask.sum(1) > 0).sum(),
            global_valid_toks=mask.sum(),
            next_token_logprobs=logprobs[rows],
        )
        total = total + loss
        clipped += metrics["clip_fraction_pos"] + metrics["clip_fraction_neg"]
        assert metrics["loss"] == loss.item()
        assert "token_mult_prob_error" in metrics  # the trainer reads it
        assert set(metrics) - set(loss_fn.metric_normalizations) == set()
        # `metric_normalizations` names the divisor by which the trainer turns sums into means.
        assert loss_fn.metric_normalizations["clip_fraction_pos"].value == "tokens"
    (found,) = torch.autograd.grad(total, logprobs)
    torch.testing.assert_close(found, by_definition(data, logprobs, token_level), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 0.01
    r, up = (logprobs - data["prev_logprobs"][:, 1:]).detach().exp(), data["advantages"][:, 1:] > 0
    outside = torch.where(up, r > 1.2, r < 0.8) * mask
    assert clipped == pytest.approx(float(outside.sum() / mask.sum()))
    assert clipped > 0


def test_anchored_at_the_sampler_the_ratio_is_to_its_log_probs(adapter: Any) -> None:
    """Asynchronous GRPO requires use_importance_sampling_correction, which this ratio replaces."""
    data, logprobs = batch()
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    settings = config(use_importance_sampling_correction=True)
    gradients = []
    for band, anchor_band in ((1e9, None), (2.0, (0.5, 2.0))):
        loss_fn = adapter.ASPOLossFn(settings, loss={"anchor": "rollout", "anchor_band": anchor_band})
        loss, _ = loss_fn(logprobs, data, (mask.sum(1) > 0).sum(), mask.sum())
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
        expected = by_definition(data, logprobs, True, "generation_logprobs", band)
        torch.testing.assert_close(gradients[-1], expected, rtol=1e-9, atol=1e-12)
    assert (gradients[0] - gradients[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"does not take loss_fn\.use_cispo=True"):
        adapter.ASPOLossFn(config(use_cispo=True), loss={"anchor": "rollout"})


@pytest.mark.parametrize("missing", [torch.nan, -torch.inf])
def test_a_token_without_the_samplers_log_prob_has_no_gradient(adapter: Any, missing: float) -> None:
    """ClippedPGLossFn's correction weighs it by 0, too."""
    data, logprobs = batch()
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    data["advantages"][0] *= -1
    signs = (data["advantages"][:, 1:] * mask)[:, 2:4].sign()
    assert (signs.min(), signs.max()) == (-1, 1)
    loss_fn, gradients = adapter.ASPOLossFn(config(), loss={"anchor": "rollout"}), []
    for name, value in (("generation_logprobs", missing), ("advantages", 0)):
        changed = {**data, name: data[name].clone()}
        changed[name][:, 3:5] = value
        loss, _ = loss_fn(logprobs, changed, (mask.sum(1) > 0).sum(), mask.sum())
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.01


@pytest.mark.parametrize("kind", ["tis", "icepop", "seq-mask-tis"])
def test_the_anchors_band_replaces_truncated_importance_sampling(adapter: Any, kind: str) -> None:
    given = {"type": kind, "ratio": 2.0, "ratio_min": 0.5}
    fields = {f"truncated_importance_sampling_{name}": value for name, value in given.items()}
    refused = ", ".join(f"loss_fn.{name}={value}" for name, value in fields.items())
    fix = " ".join(f"loss_fn.{name}=null" for name in fields)
    message = (
        f"ASPOLossFn does not take {refused}: set {fix} and anchor_band in loss, such as (0.2, 5) (see its README)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapter.ASPOLossFn(config(**fields, use_importance_sampling_correction=True), loss={"anchor": "rollout"})


@pytest.mark.parametrize("field", [name for name, value in FIELDS.items() if value in (False, 0.0, 0.01)])
def test_what_is_not_taken_is_named(adapter: Any, field: str) -> None:
    """The value that the message recommends is accepted."""
    given, advice = (True, "false") if FIELDS[field] is False else (0.02, "0")
    changes = {field: given, "token_level_loss": field == "use_cispo"}
    message = f"ASPOLossFn does not take loss_fn.{field}={given}: set loss_fn.{field}={advice} (see its README)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapter.ASPOLossFn(config(**changes))
    adapter.ASPOLossFn(config(**changes | {field: json.loads(advice)}))


def test_a_kl_penalty_that_is_left_out_is_not_0(adapter: Any) -> None:
    functions = importlib.import_module("nemo_rl.algorithms.loss.loss_functions")
    with pytest.raises(ValueError, match=r"not take loss_fn.reference_policy_kl_penalty=0.01: set loss_fn.\w+=0 \("):
        adapter.ASPOLossFn(functions.ClippedPGLossConfig())
    both = r"penalty=0.01: set loss_fn.disable_ppo_ratio=false loss_fn.reference_policy_kl_penalty=0 \("
    with pytest.raises(ValueError, match=both):
        adapter.ASPOLossFn(functions.ClippedPGLossConfig(disable_ppo_ratio=True))


def test_clips_are_those_of_the_section(adapter: Any) -> None:
    made = adapter.ASPOLossFn(config(ratio_clip_min=0.1, ratio_clip_max=0.3, ratio_clip_c=2.5)).policy_loss
    assert (made.clip_low, made.clip_high, made.dual_clip) == (0.1, 0.3, 2.5)
    section = config(ratio_clip_c=None)
    assert adapter.ASPOLossFn(section).policy_loss.dual_clip == "default"  # 3, GRPO's none


def settings(recipe: str, overrides: list[str]) -> Any:
    """Build the configuration as NeMo-RL does: overriding a missing key is an error."""
    if INSTALLED:
        made = importlib.import_module("nemo_rl.utils.config")
        made.register_omegaconf_resolvers()
        checkout = Path(importlib.import_module("nemo_rl").__file__ or "").parents[1]
        return made.parse_hydra_overrides(made.load_config(checkout / recipe), overrides)
    assert recipe == RECIPE
    found = OmegaConf.create(PUBLISHED)
    OmegaConf.set_struct(found, True)
    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(found, override.key_or_group, override.value())
    return found


def test_the_pages_lines_take_the_pages_settings(adapter: Any) -> None:
    (command,) = (shlex.split(block.replace("\\\n", " ")) for block in blocks("bash") if "uv run" in block)
    assert command[:3] == ["uv", "run", "examples/run_aspo.py"]
    assert "to `examples/run_aspo.py`" in README
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    known, overrides = parser.parse_known_args(command[3:])
    found = settings(known.config, overrides)
    for key in re.findall(r"`((?:grpo|policy|loss_fn)\.[\w.]+)`", README):
        assert OmegaConf.select(found, key) is not None, key
    responses = found.grpo.num_prompts_per_step * found.grpo.num_generations_per_prompt
    assert responses > found.policy.train_global_batch_size  # several updates
    assert responses % found.policy.train_global_batch_size == 0

    untouched = settings(known.config, [])  # the recipe's loss has a KL penalty, which the adapter refuses
    with pytest.raises(ValueError, match=r"does not take loss_fn.reference_policy_kl_penalty=0.01: set "):
        adapter.ASPOLossFn(config(**untouched.loss_fn))

    # With Megatron's fused linear log-probs the model returns log-probs, not logits; the trainer reads this flag.
    of_setup = SimpleNamespace(use_fused_linear_logprobs=True)
    names: dict[str, Any] = {"config": SimpleNamespace(loss_fn=config(**found.loss_fn)), "loss_fn": of_setup}
    (lines,) = blocks("python")
    exec(lines, names)
    assert names["loss_fn"].use_fused_linear_logprobs
    made = names["loss_fn"].policy_loss
    assert (made.objective, made.clip_low, made.clip_high, made.dual_clip) == ("aspo", 0.2, 0.2, 3.0)
    assert made.aggregation == "token-mean"
