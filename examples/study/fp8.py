"""Compare each FP8 recipe of Transformer Engine with bf16: how far does it move a policy?

    .venv/bin/python examples/study/fp8.py

Transformer Engine's own Python runs on kernels in torch operations (tests/te_reference), so no GPU is needed. Writes
docs/fp8.json and docs/fp8.png; about four minutes on one core. Needs `make smollm2 .cache/te/.installed`.

Expectations are over the *whole* vocabulary under the model without FP8, at every position of a fixed text; nothing is
sampled. Then all weights take a step like Adam's first (lr x the gradient's sign). The importance ratio of the stepped
to the first model, both in FP8, is compared with the ratio without FP8. The step also gives the fraction of tokens that
ASPO clips, with equal weight for both signs of the advantage.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reasoning_gym import create_dataset
from torch import Tensor

from megatron_aspo.batch import MicroBatch, Prompt, Sample
from megatron_aspo.config.fp8 import Fp8Config
from megatron_aspo.config.load import load_config
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.loss.objectives import TokenInputs, aspo
from megatron_aspo.policy.model import fp8_settings, model_inputs
from megatron_aspo.policy.packing import pack
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed

ROOT = Path(__file__).parents[2]
MODEL = "SmolLM2-135M"
STEPS = (1e-5, 1e-4)
RECIPES = ("delayed", "current", "blockwise", "mxfp8")
CLIP = PolicyLossConfig(dual_clip=3.0)


def text(config: RunConfig, problems: int) -> list[Sample]:
    """Return problems with their answers, each as one sample."""
    tokenizer = load_tokenizer(config.model, config.data)
    entries = create_dataset("gsm_symbolic", size=problems, seed=7)
    ids = [np.array(tokenizer.encode(f"{entry['question']}\nAnswer: {entry['answer']}")) for entry in entries]
    return [Sample(Prompt(i, "", (int(tokens[0]),), {}), i, tokens[1:], "stop") for i, tokens in enumerate(ids)]


def log_softmax(policy: Policy, batch: MicroBatch) -> Tensor:
    """Return log-probs [n, V] in float32 at the positions that predict a token of the text."""
    policy.model.module.module.set_is_first_microbatch()  # quantizes the weights again
    output = policy.model(**model_inputs(batch), **policy._output_dtype)
    return output[0][batch.loss_mask].float().log_softmax(-1)


@torch.no_grad()
def measure(policy: Policy, batch: MicroBatch) -> Tensor:
    policy.model.eval()
    return log_softmax(policy, batch)


def gradient_signs(policy: Policy, batch: MicroBatch) -> list[Tensor]:
    """Return the sign (int8) of the gradient of the text's negative log-likelihood for every weight."""
    policy.model.train()
    policy.model.zero_grad_buffer()
    taken = log_softmax(policy, batch).gather(1, batch.labels[batch.loss_mask][:, None])
    (-taken.mean()).backward()
    return [p.main_grad.sign().to(torch.int8) for p in policy.model.parameters()]


def after_step(weights: list[Tensor], signs: list[Tensor], lr: float) -> list[Tensor]:
    return [(w.float() - lr * sign).to(w.dtype) for w, sign in zip(weights, signs, strict=True)]


def moved(base: Tensor, other: Tensor) -> dict[str, float]:
    """Return expectations under `base` of d = `other` - `base`, both log-probs [n, V]."""
    p, d = base.exp(), other - base
    expected = lambda values: float((p * values).sum(-1).mean())  # noqa: E731
    outside = (d.exp() < 0.5) | (d.exp() > 2)
    likely = d[p > 0.01]
    return {
        "mean |d|": expected(d.abs()),
        "max |d|": float(likely.abs().max()),  # over tokens with a probability above 1 %
        "KL": expected(torch.expm1(d) - d),
        "outside": expected(outside.float()),
    }


def clipped(old: Tensor, new: Tensor) -> float:
    """Return the expected fraction of tokens under `old` that ASPO clips, averaged over both signs of the advantage."""
    shares: list[float] = []
    for sign in (1.0, -1.0):
        ratio = (new - old).exp()
        low, high = torch.full_like(ratio, CLIP.clip_low), torch.full_like(ratio, CLIP.clip_high)
        terms = aspo(TokenInputs(new, ratio, torch.full_like(ratio, sign), low, high, ratio), CLIP)
        shares.append(float((old.exp() * terms.hard_clipped).sum(-1).mean()))
    return sum(shares) / 2


@torch.no_grad()
def assign(policy: Policy, weights: list[Tensor]) -> None:
    for parameter, weight in zip(policy.model.parameters(), weights, strict=True):
        parameter.copy_(weight)


def study(config: RunConfig, recipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the step does without FP8, and what the recipe changes."""
    with distributed(config):
        policy = Policy(config, load_tokenizer(config.model, config.data).vocab_size)
        (batch,) = pack(text(config, 4), dp_rank=0, dp_size=1, max_tokens=1 << 16, multiple=128)
        weights = [p.detach().clone() for p in policy.model.parameters()]
        signs = gradient_signs(policy, batch)
        base = measure(policy, batch)
        p, changes = base.exp(), {}
        without: dict[str, Any] = {"tokens": len(base)}

        def spread(x: Tensor) -> float:
            return float((p * x.square()).sum(-1).mean().sqrt())

        for lr in STEPS:
            assign(policy, after_step(weights, signs, lr))
            stepped = measure(policy, batch)
            changes[lr] = stepped - base
            without[str(lr)] = {"ratio": spread(changes[lr]), "clipped": clipped(base, stepped)}
        assign(policy, weights)
        # The model's 576 columns are no whole blocks of 128, so a configuration with blockwise would be refused.
        vars(policy.model.module.module.config).update(fp8_settings(Fp8Config(recipe=recipe)))
        found: dict[str, Any] = {}
        if recipe == "delayed":
            found["first pass"] = moved(base, measure(policy, batch))
            policy.model.train()
            log_softmax(policy, batch)  # with gradients: this pass defines the scales
        old = measure(policy, batch)
        found |= moved(base, old)
        found["steps"] = {}
        for lr in STEPS:
            assign(policy, after_step(weights, signs, lr))
            new = measure(policy, batch)
            error = spread((new - old) - changes[lr])
            found["steps"][str(lr)] = {"ratio error": error, "clipped": clipped(old, new)}
        return without, found


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    rows = [figures["recipes"][recipe] for recipe in RECIPES]
    small, large = map(str, STEPS)
    panels = (
        [row["mean |d|"] for row in rows],
        [row["KL"] for row in rows],
        [row["steps"][large]["clipped"] for row in rows],
    )
    for ax, values in zip(axes, panels, strict=True):
        ax.bar_label(ax.bar(RECIPES, values, 0.6, color="#0072B2"), fmt="%.2g", fontsize=7)
    axes[2].axhline(figures["without"][large]["clipped"], color="#E69F00", ls=":", lw=1.5)
    axes[2].plot(RECIPES, [row["steps"][small]["clipped"] for row in rows], "k_", ms=9)
    titles = (
        "mean |Δ log-prob|, nats",
        "KL(without ‖ with FP8), nats",
        f"tokens that ASPO clips after a step of {STEPS[1]:g}\n(dotted: without FP8;  black: a tenth of the step)",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=9)
        ax.margins(y=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.path[:0] = [str(ROOT / "tests/distributed"), str(ROOT / "tests"), str(ROOT)]
    import te_ranks

    from examples.study import fp8 as importable

    config = load_config(ROOT / "examples/smollm2_135m.yaml", [f"model.hf_path={ROOT}/models/{MODEL}-Instruct"])
    figures: dict[str, Any] = {"model": MODEL, "recipes": {}}
    for recipe in RECIPES:
        gpu = te_ranks.BLACKWELL if recipe == "mxfp8" else te_ranks.HOPPER
        ((without, found),) = te_ranks.run(1, importable.study, config, recipe, capability=gpu, timeout=3600)
        figures["without"], figures["recipes"][recipe] = without, found
        print(recipe, json.dumps(found), flush=True)
    (ROOT / "docs" / "fp8.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, ROOT / "docs" / "fp8.png")


if __name__ == "__main__":
    main()
