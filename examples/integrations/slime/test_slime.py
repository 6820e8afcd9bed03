"""Tests the adapter against slime's published interface; slime cannot be installed here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")

# THUDM/slime, slime/backends/megatron_utils/loss.py at 00c2d6db0f23a4900be6e80a8eb81eebf9e1ebff: `loss_function` calls
# the function of --custom-loss-function-path by position, with the parameters of its own `policy_loss_function`.
CALLED_WITH = ["args", "batch", "logits", "sum_of_sample_mean"]

# slime's flags on the page, with their types: slime/utils/arguments.py at 002fa9d6bac42357d127df88ba01853fc56f939b.
FLAGS: dict[Any, str] = {
    int: "actor-num-nodes actor-num-gpus-per-node rollout-num-gpus-per-engine num-rollout rollout-batch-size "
    "n-samples-per-prompt rollout-max-response-len max-tokens-per-gpu",
    float: "rollout-temperature eps-clip eps-clip-high eps-clip-c entropy-coef",
    str: "loss-type pg-loss-type custom-loss-function-path advantage-estimator hf-checkpoint ref-load prompt-data "
    "input-key label-key rm-type",
    bool: "colocate apply-chat-template balance-data use-dynamic-batch-size recompute-loss-function use-kl-loss "
    "use-rollout-logprobs",
}
CHOICES = {
    "loss-type": ["policy_loss", "sft_loss", "custom_loss"],
    "pg-loss-type": ["ppo", "reinforce"],
    "advantage-estimator": ["grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"],
}
PROMPT, RESPONSES, VOCAB = 2, (4, 1, 6), 7


def get_log_probs_and_entropy(
    logits: Tensor,
    *,
    args: Namespace,
    unconcat_tokens: list[Tensor],
    total_lengths: list[int],
    response_lengths: list[int],
    with_entropy: bool = False,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Stand-in for slime's function: tensors [response] per sample, on one rank."""
    found: dict[str, list[Tensor]] = {"log_probs": [], "entropy": []}
    assert with_entropy
    for tokens, rows, response in zip(unconcat_tokens, logits[0].split(total_lengths), response_lengths, strict=True):
        table = (rows[-response - 1 : -1] / args.rollout_temperature).log_softmax(-1)
        found["log_probs"].append(table.gather(-1, tokens[-response:, None])[:, 0])
        found["entropy"].append(-(table.exp() * table).sum(-1))
    return torch.empty(0), found


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
) -> Tensor:
    d = log_probs - log_probs_base
    kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[kl_loss_type]
    return kl if importance_ratio is None else importance_ratio * kl


@pytest.fixture
def aspo_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The adapter's function, imported by path as slime does."""
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    there: Any = ModuleType("slime.backends.megatron_utils.loss")
    there.get_log_probs_and_entropy = get_log_probs_and_entropy
    there.get_rollout_top_p_logprob_kwargs = lambda args, batch: {}
    there.compute_approx_kl = compute_approx_kl
    monkeypatch.setitem(sys.modules, there.__name__, there)
    monkeypatch.syspath_prepend(str(FOLDER))
    words = submitted()
    module, _, function = words[words.index("--custom-loss-function-path") + 1].rpartition(".")
    return getattr(importlib.import_module(module), function)


@functools.cache
def submitted() -> list[str]:
    """Arguments of `ray` in the page's command after expansion by bash, with MODEL_ARGS as in slime's script."""
    (command,) = (b for b in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if "train.py" in b)
    with tempfile.TemporaryDirectory() as checkout:
        script = Path(checkout, "scripts/models/qwen3-32B.sh")
        script.parent.mkdir(parents=True)
        script.write_text('MODEL_ARGS=(\n   --num-layers 64\n   --normalization "RMSNorm"\n)\n')
        done = subprocess.run(
            ["bash", "-euc", f"ray() {{ printf '%s\\0' \"$@\"; }}\n{command}"],
            cwd=checkout,
            env=os.environ | {"ASPO": "/aspo", "MEGATRON": "/megatron", "MODELS": "/models", "DATA": "/data"},
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.split("\0")[:-1]


def flags_parser() -> ArgumentParser:
    """Parser of Megatron's and slime's flags, of the installed slime or as published."""
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    if INSTALLED:
        return importlib.import_module("slime.utils.arguments").get_slime_extra_args_provider()(parser)
    for kind, names in FLAGS.items():
        for name in names.split():
            taken: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
            if name in CHOICES:
                taken["choices"] = CHOICES[name]
            parser.add_argument(f"--{name}", **taken)
    return parser


def arguments(**changes: Any) -> Namespace:
    given = {
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": None,
        "eps_clip_c": None,
        "entropy_coef": 0.0,
        "rollout_temperature": 0.8,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k1",
        "pg_loss_type": None,
    }
    off = ("use_rollout_logprobs", "use_kl_loss", "use_unbiased_kl", "use_tis", "use_opsm", "get_mismatch_metrics")
    return Namespace(**{**given, **dict.fromkeys(off, False), **changes})


def batch() -> tuple[dict[str, Any], Tensor]:
    draw = torch.Generator().manual_seed(0)
    totals = [PROMPT + length for length in RESPONSES]
    logits = 2 * torch.randn(1, sum(totals), VOCAB, generator=draw, dtype=torch.float64)
    tokens = [torch.randint(VOCAB, (total,), generator=draw) for total in totals]
    lengths = {"total_lengths": totals, "response_lengths": list(RESPONSES), "unconcat_tokens": tokens}
    _, now = get_log_probs_and_entropy(logits, args=arguments(), with_entropy=True, **lengths)
    noise = [torch.randn(length, generator=draw, dtype=torch.float64) for length in RESPONSES]
    masks = [torch.ones(length) for length in RESPONSES]
    masks[2][1:3] = 0
    return {
        **lengths,
        "log_probs": [one + by for one, by in zip(now["log_probs"], noise, strict=True)],
        "advantages": [
            torch.full((n,), a, dtype=torch.float64) for n, a in zip(RESPONSES, (1.5, -0.7, -2), strict=True)
        ],
        "loss_masks": masks,
    }, logits.requires_grad_()


def reduction(masks: list[Tensor], per_token: bool) -> Callable[[Tensor], Tensor]:
    """slime's two reductions: the sum of the samples' means, or the sum over tokens."""
    sizes = [len(mask) for mask in masks]

    def reduce(values: Tensor) -> Tensor:
        parts = zip(values.split(sizes), masks, strict=True)
        sums = [((part * mask).sum(), mask.sum().clamp(min=1)) for part, mask in parts]
        return sum((total if per_token else total / count for total, count in sums), values.new_zeros(()))

    return reduce


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


INSTALLED = installed("slime.backends.megatron_utils")


def test_slimes_call_fits(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """If slime is installed, its functions have the parameters of the stand-ins."""
    if INSTALLED:
        there = importlib.import_module("slime.backends.megatron_utils.loss")
        assert list(inspect.signature(there.policy_loss_function).parameters) == CALLED_WITH
        assert list(inspect.signature(there.get_rollout_top_p_logprob_kwargs).parameters) == ["args", "batch"]
        passed = inspect.signature(get_log_probs_and_entropy).parameters
        assert set(passed) <= set(inspect.signature(there.get_log_probs_and_entropy).parameters)
        assert inspect.signature(there.compute_approx_kl).parameters.keys() == (
            inspect.signature(compute_approx_kl).parameters.keys()
        )
    aspo_loss = request.getfixturevalue("aspo_loss")
    assert list(inspect.signature(aspo_loss).parameters) == CALLED_WITH


def test_the_pages_command_is_slimes_and_megatrons() -> None:
    words = submitted()
    ray, job = words[: words.index("--")], words[words.index("--") + 1 :]
    assert ray[:3] == ["job", "submit", "--address=http://127.0.0.1:8265"]
    variables = json.loads(ray[3].removeprefix("--runtime-env-json="))["env_vars"]
    assert variables["PYTHONPATH"] == "/megatron:/aspo:/aspo/examples/integrations/slime"
    assert len(ray) == 4
    assert job[:2] == ["python3", "train.py"]
    parser = flags_parser()
    found = parser.parse_args(job[2:])  # exits on an unknown flag or value
    assert (found.num_layers, found.normalization) == (64, "RMSNorm")  # from MODEL_ARGS
    assert (found.loss_type, found.advantage_estimator, found.eps_clip, found.eps_clip_high) == (
        ("custom_loss", "grpo", 0.2, 0.2)
    )
    assert found.global_batch_size < found.rollout_batch_size * found.n_samples_per_prompt  # several updates
    assert found.rollout_batch_size * found.n_samples_per_prompt % found.global_batch_size == 0
    # The adapter refuses this value, which slime accepts.
    assert parser.parse_args([*job[2:], "--pg-loss-type", "reinforce"]).pg_loss_type == "reinforce"
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - {"--address", "--runtime-env-json"}
    assert named <= set(parser._option_string_actions)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_is_aspos(aspo_loss: Callable[..., Any], per_token: bool, recompute: bool) -> None:
    given, logits = batch()
    reduce = reduction(given["loss_masks"], per_token)
    call = (arguments(entropy_coef=0.1), given, logits, reduce)
    # --recompute-loss-function calls the loss under `checkpoint`.
    loss, log = checkpoint(aspo_loss, *call, use_reentrant=False) if recompute else aspo_loss(*call)
    (found,) = torch.autograd.grad(loss, logits)

    lengths = {name: given[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    _, now = get_log_probs_and_entropy(logits, args=arguments(), with_entropy=True, **lengths)
    logprobs, advantages = torch.cat(now["log_probs"]), torch.cat(given["advantages"])
    r = (logprobs - torch.cat(given["log_probs"])).detach().exp()
    up = torch.where(r > 1.2, 0.0, (1 / r).clamp(max=3))
    down = torch.where(r < 0.8, 0.0, r.clamp(max=3))
    weight = torch.where(advantages > 0, up, down)
    definition = reduce(-weight * advantages * logprobs) - 0.1 * reduce(torch.cat(now["entropy"]))
    (expected,) = torch.autograd.grad(definition, logits)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    outside = torch.where(advantages > 0, r > 1.2, r < 0.8).double()
    assert float(log["pg_clipfrac"]) == pytest.approx(float(reduce(outside)))
    assert 0 < float(log["pg_clipfrac"]) < float(reduce(torch.ones_like(outside)))
    assert all(value.dim() == 0 and not value.requires_grad for value in log.values())


def test_without_old_log_probs_every_ratio_is_one(aspo_loss: Callable[..., Any]) -> None:
    given, logits = batch()
    del given["log_probs"]
    _, log = aspo_loss(arguments(), given, logits, reduction(given["loss_masks"], True))
    assert (float(log["ppo_kl"]), float(log["pg_clipfrac"]), float(log["soft_clipfrac"])) == (0, 0, 0)


def test_a_batch_that_is_wholly_masked_still_reaches_the_logits(aspo_loss: Callable[..., Any]) -> None:
    given, logits = batch()
    given["loss_masks"] = [torch.zeros_like(mask) for mask in given["loss_masks"]]
    given["log_probs"][0][0] = torch.nan  # masked values may be anything
    loss, _ = aspo_loss(arguments(), given, logits, reduction(given["loss_masks"], False))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert bool((gradient == 0).all())


def test_a_rank_without_a_token_still_reaches_the_logits(
    aspo_loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context-parallel rank may have no tokens."""
    given, logits = batch()
    none = [torch.empty(0, dtype=torch.float64) for _ in RESPONSES]
    found = {"log_probs": none, "entropy": none}
    monkeypatch.setattr(
        sys.modules["slime.backends.megatron_utils.loss"],
        "get_log_probs_and_entropy",
        lambda *args, **kwargs: (torch.empty(0), found),
    )
    empty = {**given, "log_probs": none, "advantages": none}
    loss, log = aspo_loss(arguments(), empty, logits, lambda values: values.sum())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (loss.item(), float(log["pg_clipfrac"])) == (0, 0)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("by_rollout", [False, True])
def test_the_samplers_log_probs(aspo_loss: Callable[..., Any], by_rollout: bool) -> None:
    """The reported distance equals slime's; with --use-rollout-logprobs the old policy is the sampler."""
    given, logits = batch()
    now = torch.cat([one.detach() for one in given["log_probs"]])
    given["rollout_log_probs"] = [one + 0.5 for one in given["log_probs"]]
    reduce = reduction(given["loss_masks"], True)
    loss, log = aspo_loss(arguments(use_rollout_logprobs=by_rollout), given, logits, reduce)
    old = given["rollout_log_probs" if by_rollout else "log_probs"]
    same, _ = aspo_loss(arguments(), {**given, "log_probs": old, "rollout_log_probs": None}, logits, reduce)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, same)]
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(*gradients)
    _, plain = aspo_loss(arguments(), {**given, "rollout_log_probs": None}, logits, reduce)
    shift = reduce(torch.full_like(now, 0.5)).item()
    assert log["ppo_kl"].item() == pytest.approx(plain["ppo_kl"].item() + (shift if by_rollout else 0))
    assert "train_rollout_logprob_abs_diff" not in plain
    if not by_rollout:
        assert log["train_rollout_logprob_abs_diff"].item() == pytest.approx(shift)


@pytest.mark.parametrize("missing", [torch.nan, -torch.inf])
def test_a_token_without_the_samplers_log_prob_has_no_gradient(aspo_loss: Callable[..., Any], missing: float) -> None:
    given, logits = batch()
    reduce = reduction(given["loss_masks"], True)
    found = []
    for name, value in (("rollout_log_probs", missing), ("advantages", 0)):
        changed = {**given, "rollout_log_probs": [one + 0.5 for one in given["log_probs"]]}
        changed[name] = [one.clone() for one in changed[name]]
        for sample in changed[name][:2]:  # the advantage of the first is positive, of the second negative
            sample[0] = value
        loss, log = aspo_loss(arguments(use_rollout_logprobs=True), changed, logits, reduce)
        found.append((torch.autograd.grad(loss, logits)[0], {name: log[name] for name in ("loss", "pg_clipfrac")}))
        assert all(value.isfinite() for value in log.values()), log
        _, log = aspo_loss(arguments(), changed, logits, reduce)  # where it is only compared
        assert all(value.isfinite() for value in log.values()), log
    torch.testing.assert_close(*found)
    assert found[0][0].abs().max() > 0.01


def test_clips_and_cap_are_the_arguments(aspo_loss: Callable[..., Any]) -> None:
    given, logits = batch()
    reduce = reduction(given["loss_masks"], True)
    ratio = torch.cat([(a - b).detach() for a, b in zip(current(logits, given), given["log_probs"], strict=True)]).exp()
    positive = torch.cat(given["advantages"]) > 0
    high = float(ratio[positive].max()) - 0.99  # none is above 1 + high, one is above 1.1
    assert high > 0.1
    _, log = aspo_loss(arguments(eps_clip=0.1, eps_clip_high=high, eps_clip_c=1.5), given, logits, reduce)
    _, one = aspo_loss(arguments(eps_clip=0.1, eps_clip_c=1.5), given, logits, reduce)
    assert log["pg_clipfrac"] < one["pg_clipfrac"]
    outside = torch.where(positive, ratio > 1 + high, ratio < 0.9)
    capped = torch.where(positive, 1 / ratio, ratio) > 1.5
    assert log["pg_clipfrac"].item() == reduce(outside.double()).item()
    assert log["soft_clipfrac"].item() == reduce((capped & ~outside).double()).item() > 0


def test_top_p_is_handed_on_and_no_gradient_is_needed(
    aspo_loss: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sys.modules["slime.backends.megatron_utils.loss"]
    calls: list[dict[str, Any]] = []

    def called(logits: Tensor, *, top_p_token_ids: Any = None, **kwargs: Any) -> Any:
        calls.append({"top_p_token_ids": top_p_token_ids})
        return get_log_probs_and_entropy(logits, **kwargs)

    monkeypatch.setattr(there, "get_log_probs_and_entropy", called)
    monkeypatch.setattr(
        there, "get_rollout_top_p_logprob_kwargs", lambda args, batch: {"top_p_token_ids": batch["kept"]}
    )
    given, logits = batch()
    with torch.no_grad():
        loss, _ = aspo_loss(arguments(), {**given, "kept": "these"}, logits, reduction(given["loss_masks"], True))
    assert calls == [{"top_p_token_ids": "these"}]
    assert not loss.requires_grad


def current(logits: Tensor, given: dict[str, Any]) -> list[Tensor]:
    lengths = {name: given[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    return get_log_probs_and_entropy(logits, args=arguments(), with_entropy=True, **lengths)[1]["log_probs"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_kl_loss": True, "kl_loss_coef": 0.1, "use_tis": True}, "--kl-loss-coef, --use-tis"),
        ({"use_opsm": True}, "--use-opsm"),
        ({"get_mismatch_metrics": True}, "--get-mismatch-metrics"),
        ({"use_score_centering": True}, "--use-score-centering"),
        ({"custom_pg_loss_reducer_function_path": "a.b"}, "--custom-pg-loss-reducer-function-path"),
        ({"pg_loss_type": "reinforce"}, "--pg-loss-type reinforce"),
        ({"advantage_estimator": "gspo"}, "--advantage-estimator gspo"),
    ],
)
def test_what_is_not_taken_is_named(aspo_loss: Callable[..., Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"does not take {named}: leave it out"):
        aspo_loss(arguments(**changes), *batch(), sum)


def test_what_a_batch_lacks_is_said(aspo_loss: Callable[..., Any]) -> None:
    given, logits = batch()
    reduce = reduction(given["loss_masks"], True)
    short = {**given, "advantages": [given["advantages"][0][1:], *given["advantages"][1:]]}
    message = "advantages has shape [10], expected [11] (one for each token of the responses)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        aspo_loss(arguments(), short, logits, reduce)
    message = "--use-rollout-logprobs: the rollout gave no rollout_log_probs; return them, or leave it out"
    for lacking in (given, {**given, "rollout_log_probs": []}):
        with pytest.raises(ValueError, match=f"^{message}$"):
            aspo_loss(arguments(use_rollout_logprobs=True), lacking, logits, reduce)


def test_a_kl_loss_of_weight_0_is_taken(aspo_loss: Callable[..., Any]) -> None:
    """slime's recipes use a KL loss of weight 0 to get its metric."""
    given, logits = batch()
    reduce = reduction(given["loss_masks"], True)
    now = torch.cat(current(logits, given)).detach()
    d = torch.linspace(-1, 2, len(now), dtype=torch.float64)
    given["ref_log_probs"] = list((now - d).split(RESPONSES))
    plain, without = aspo_loss(arguments(), given, logits, reduce)
    assert "kl_loss" not in without
    ratio = (now - torch.cat(given["log_probs"]).detach()).exp()
    k3 = (-d).exp() - 1 + d
    for kind, unbiased, expected in (("k1", False, d), ("k3", False, k3), ("k3", True, ratio * k3)):
        changes = {"use_kl_loss": True, "kl_loss_type": kind, "use_unbiased_kl": unbiased}
        loss, log = aspo_loss(arguments(**changes), given, logits, reduce)
        assert log["kl_loss"].item() == pytest.approx(reduce(expected).item())
        assert abs(log["kl_loss"].item()) > 0.5
        assert not log["kl_loss"].requires_grad
        assert loss.item() == plain.item()
        assert log.keys() - {"kl_loss"} == without.keys()
