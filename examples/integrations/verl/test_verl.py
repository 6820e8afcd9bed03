"""Runs the adapter through verl's registry, `ppo_loss` and configuration. Requires verl."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.import_utils import import_external_libs
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig, FSDPActorConfig, McoreActorConfig
from verl.workers.config.actor import PolicyLossConfig as VerlPolicyLossConfig
from verl.workers.utils.losses import ppo_loss

FOLDER = Path(__file__).parent
VECTORS = json.loads((FOLDER.parents[2] / "tests/data/policy_loss_vectors.json").read_text())["cases"]
README = (FOLDER / "README.md").read_text()
CONTROLS = ("aspo_unmasked", "no_is_pos", "up", "tis", "no_is", "response_mean_is")
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the loss as a verl actor does at its start."""
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("verl_aspo", None)
    for name in ("aspo", *CONTROLS):
        core_algos.POLICY_LOSS_REGISTRY.pop(name, None)
    import_external_libs("verl_aspo")


def actor(**fields: Any) -> ActorConfig:
    named = VerlPolicyLossConfig(loss_mode="aspo")
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=named, **fields)


def test_the_version_is_the_one_that_the_page_names() -> None:
    assert f"With verl {version('verl')} " in README


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["seed"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("aspo_eps0.2_c3", {}),
        ("aspo_eps0.4_c3", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}),
        ("aspo_seq-mean-token-sum", {"loss_agg_mode": "seq-mean-token-sum"}),
        ("aspo_seq-mean-token-mean", {"loss_agg_mode": "seq-mean-token-mean"}),
    ],
)
def test_verls_registry_gives_the_authors_numbers(case: dict[str, Any], name: str, fields: dict[str, Any]) -> None:
    expect = case["expect"][name]
    logprobs = torch.tensor(case["logprobs"], dtype=torch.float64, requires_grad=True)
    config = actor(**fields)
    loss, metrics = core_algos.get_policy_loss_fn("aspo")(
        old_log_prob=torch.tensor(case["old_logprobs"], dtype=torch.float64),
        log_prob=logprobs,
        advantages=torch.tensor(case["advantages"], dtype=torch.float64),
        response_mask=torch.tensor(case["mask"]),
        loss_agg_mode=config.loss_agg_mode,
        config=config,
    )
    loss.backward()
    expected = torch.tensor(expect["dloss_dlogprobs"], dtype=torch.float64)
    assert loss.item() == pytest.approx(expect["loss"], rel=1e-8)
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-8, atol=1e-10)
    # The authors' fractions are of the tokens of one sign, verl's are of all tokens.
    mask, advantages = torch.tensor(case["mask"]).bool(), torch.tensor(case["advantages"])
    signs = [float((mask & has).sum() / mask.sum()) for has in (advantages < 0, advantages > 0)]
    soft = [metrics["actor/soft_clip_fraction_neg"], metrics["actor/soft_clip_fraction_pos"]]
    assert soft == pytest.approx([share * of for share, of in zip(expect["aux"][2:], signs, strict=True)])


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_has_the_librarys_gradient(name: str) -> None:
    from megatron_aspo.loss import PolicyLossConfig, policy_loss

    rows, gradients = batch(), list[Tensor]()
    for is_verls in (True, False):
        leaf = rows["log_probs"].clone().requires_grad_()
        given = rows["old_log_probs"], leaf, rows["advantages"], rows["response_mask"]
        if is_verls:
            loss, _ = core_algos.get_policy_loss_fn(name)(*given, "token-mean", actor(**CLIPS), None)
        else:
            config = PolicyLossConfig(objective=name, clip_low=0.1, clip_high=0.3, dual_clip=2.0)
            out = policy_loss(leaf, given[0], given[2], given[3], config)
            loss = out.loss_sum / rows["response_mask"].sum()
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients)


# --- verl's own step from model output to loss ---

RESPONSES, PROMPT, LENGTH = 6, 3, 8


def batch() -> dict[str, Tensor]:
    """Responses of several lengths, one fully masked; the masks have gaps, as after tool calls."""
    draw = torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(RESPONSES, LENGTH, generator=draw, dtype=torch.float64)

    attended = torch.arange(LENGTH) < torch.tensor([8, 3, 5, 8, 1, 6])[:, None]
    mask = attended & (torch.rand(RESPONSES, LENGTH, generator=draw) < 0.8)
    mask[3] = False
    old = normal() - 3
    return {
        "attention_mask": torch.cat([torch.ones(RESPONSES, PROMPT, dtype=torch.long), attended.long()], 1),
        "response_mask": mask.long(),
        "old_log_probs": old,
        "log_probs": old + normal(0.7),
        "advantages": normal()[:, :1].expand(-1, LENGTH).clone(),
        "rollout_is_weights": normal().abs(),
    }


def share(rows: dict[str, Tensor], config: ActorConfig, of_all: dict[str, Any]) -> tuple[float, dict[str, Any], Tensor]:
    """Return loss, metrics and gradient [responses, LENGTH] of `ppo_loss` on a packed micro-batch."""
    count = len(rows["response_mask"])
    data = TensorDict({k: v for k, v in rows.items() if k not in ("log_probs",)}, batch_size=[count])
    data["prompts"] = torch.zeros(count, PROMPT, dtype=torch.long)
    data["responses"] = torch.zeros(count, LENGTH, dtype=torch.long)
    for name, value in of_all.items():
        tensordict_utils.assign_non_tensor(data, **{name: value})
    leaf = rows["log_probs"].clone().requires_grad_()
    kept = rows["attention_mask"].bool()
    # The model's output at a position is the log-prob of the next token.
    shifted = torch.nn.functional.pad(torch.nn.functional.pad(leaf, (PROMPT - 1, 0)), (0, 1))
    loss, metrics = ppo_loss(config, {"log_probs": shifted[kept]}, data)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), metrics, leaf.grad


CLIPS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 2.0}


def by_definition(rows: dict[str, Tensor], mode: str, scale: int | None) -> Tensor:
    """Return the gradient [responses, LENGTH]: -w(r, A) A per token, with verl's aggregation of its own losses."""
    leaf = rows["log_probs"].clone().requires_grad_()
    r, advantages = (rows["log_probs"] - rows["old_log_probs"]).exp(), rows["advantages"]
    up = torch.where(r > 1.3, 0.0, (1 / r).clamp(max=2))
    down = torch.where(r < 0.9, 0.0, r.clamp(max=2))
    weight = torch.where(advantages > 0, up, down) * rows.get("rollout_is_weights", torch.ones_like(r))
    loss = core_algos.agg_loss(-weight * advantages * leaf, rows["response_mask"], mode, loss_scale_factor=scale)
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_ppo_loss_is_the_mean_over_the_global_batch(mode: str, weighted: bool) -> None:
    rows = batch()
    if not weighted:
        del rows["rollout_is_weights"]
    mask = rows["response_mask"]
    config = actor(loss_agg_mode=mode, loss_scale_factor=16 if mode.endswith("norm") else None, **CLIPS)
    of_all = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": RESPONSES - 1}
    # Two data-parallel ranks with two micro-batches each: verl averages over ranks and sums over micro-batches.
    total, gradient = 0.0, torch.zeros(RESPONSES, LENGTH, dtype=torch.float64)
    for start, end in ((0, 2), (2, 3), (3, 4), (4, 6)):
        part, _, grad = share({name: value[start:end] for name, value in rows.items()}, config, of_all)
        total += part / 2
        gradient[start:end] = grad / 2
    whole = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    loss, metrics, at_once = share(rows, config, whole)
    torch.testing.assert_close(gradient, at_once, rtol=1e-10, atol=1e-12)
    assert total == pytest.approx(loss, rel=1e-10)
    assert 0.1 < metrics["actor/clip_fraction_pos"].aggregate() < 0.9
    # The reported loss has the loss's own mean, a sum over tokens the mean over tokens.
    assert metrics["actor/value"].aggregate() == pytest.approx(loss / (mask.sum() if mode == "token-sum" else 1))
    torch.testing.assert_close(at_once, by_definition(rows, mode, config.loss_scale_factor), rtol=1e-9, atol=1e-12)
    assert bool((gradient[3] == 0).all())


def test_in_bypass_mode_the_ratio_is_to_the_samplers_log_probs() -> None:
    """verl's V1 trainer, by its own code: its module imports TransferQueue, whose place a dict takes here."""
    (folder,) = importlib.util.find_spec("verl").submodule_search_locations  # type: ignore[union-attr, misc]
    source = (Path(folder) / "trainer/ppo/v1/trainer_base.py").read_text()
    (function,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_old_log_prob"
    )
    rows = batch()
    stored = {"rollout_log_probs": rows["old_log_probs"] + 0.5}
    queue = SimpleNamespace(
        kv_batch_get=lambda select_fields, **_: {name: stored[name] for name in select_fields},
        kv_batch_put=lambda fields, **_: stored.update(fields),
    )
    names: dict[str, Any] = {"tq": queue, "KVBatchMeta": Any}
    exec(compile(ast.Module([function], []), "trainer_base.py", "exec"), names)
    # The page's setting, as verl reads it.
    (setting,) = re.findall(r"`algorithm\.([a-z_.]*bypass_mode=true)`", README)
    algorithm = OmegaConf.from_dotlist([setting])
    trainer = SimpleNamespace(config=SimpleNamespace(algorithm=algorithm))
    names["_compute_old_log_prob"](trainer, SimpleNamespace(keys=[], partition_id=""), {})

    # The actor gets what the trainer stored. No other code of the V1 trainer changes the name of the loss.
    assert "loss_mode" not in source
    whole = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    anchored = rows | {"old_log_probs": stored["old_log_probs"]}
    *_, gradient = share(anchored, actor(loss_agg_mode="token-mean", **CLIPS), whole)
    expected = by_definition(rows | {"old_log_probs": rows["old_log_probs"] + 0.5}, "token-mean", None)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 0.01


def test_without_ranges_of_its_own_it_is_clip_ratio() -> None:
    rows, of_all = batch(), {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    given = actor(clip_ratio=0.3)
    # verl's default is 0.2; with None clip_ratio applies.
    object.__setattr__(given, "clip_ratio_low", None)
    object.__setattr__(given, "clip_ratio_high", None)
    *_, expected = share(rows, actor(clip_ratio_low=0.3, clip_ratio_high=0.3), of_all)
    torch.testing.assert_close(share(rows, given, of_all)[2], expected)


def logged(rows: dict[str, Tensor], parts: list[slice]) -> dict[str, float]:
    """Reduce metrics of micro-batches as verl's workers do."""
    of_all = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    found: dict[str, Metric] = {}
    for part in parts:
        _, metrics, _ = share({name: value[part] for name, value in rows.items()}, actor(), of_all)
        for name, metric in metrics.items():
            found.setdefault(name, metric.init_list()).extend(metric)
    return {name: Metric.aggregate_dp([metric]) for name, metric in found.items()}


def test_metrics_of_micro_batches_of_one_response() -> None:
    """Every micro-batch has a single sign of advantage. At ratio 1 all metrics are 1; later the signs differ."""
    rows = batch()
    del rows["rollout_is_weights"]
    rows["response_mask"] = torch.ones_like(rows["response_mask"])
    rows["attention_mask"] = torch.ones_like(rows["attention_mask"])
    rows["advantages"] = torch.tensor([1.0, -1, -1, 1, -1, -1])[:, None].expand(-1, LENGTH).double()
    alone, whole = [slice(i, i + 1) for i in range(RESPONSES)], [slice(0, RESPONSES)]
    at_one = logged(rows | {"log_probs": rows["old_log_probs"]}, alone)
    for name in ("ratio_pos", "ratio_neg", "weight_pos", "weight_neg"):
        assert at_one[f"actor/{name}"] == pytest.approx(1)
    moved = torch.where(rows["advantages"] > 0, 0.1, -0.1)
    after = logged(rows | {"log_probs": rows["old_log_probs"] + moved}, alone)
    up, down = math.exp(0.1), math.exp(-0.1)
    expected = {"ratio_pos": (4 + 2 * up) / 6, "weight_pos": (4 + 2 / up) / 6}
    expected |= {"ratio_neg": (2 + 4 * down) / 6, "weight_neg": (2 + 4 * down) / 6, "clip_fraction_pos": 0}
    assert {name: after[f"actor/{name}"] for name in expected} == pytest.approx(expected, rel=1e-6)
    # The metrics do not depend on the split into micro-batches.
    for drawn in (rows, rows | {"log_probs": rows["old_log_probs"] + moved}):
        cut, uncut = logged(drawn, alone), logged(drawn, whole)
        for name in {name for name in cut if name.startswith("actor/")} - {"actor/pg_loss"}:
            assert cut[name] == pytest.approx(uncut[name], rel=1e-6), name
    assert 0.05 < logged(rows, alone)["actor/clip_fraction_neg"] < 0.6


def test_the_page_names_the_metrics_that_come() -> None:
    rows, of_all = batch(), {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    _, metrics, _ = share(rows, actor(), of_all)
    named = set(re.findall(r"`(actor/[a-z_]+)`", README))
    assert {"actor/weight_pos", "actor/pg_clipfrac"} <= named
    assert named - set(metrics) == {"actor/pg_clipfrac"}  # a metric of verl's own losses


def test_a_missing_global_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no size of the global batch for loss_agg_mode=token-mean on 2 ranks"):
        share(batch(), actor(), {"dp_size": 2, "batch_num_tokens": None, "global_batch_size": None})


# --- The page's commands ---


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [
        words for words in (shlex.split(b.replace("\\\n", " ")) for b in blocks) if "verl.trainer.main_ppo" in words
    ]


@pytest.mark.parametrize(("words", "kind"), list(zip(commands(), (McoreActorConfig, FSDPActorConfig), strict=True)))
def test_verl_takes_the_pages_commands(words: list[str], kind: type[ActorConfig]) -> None:
    settings = words[words.index("verl.trainer.main_ppo") + 1 :]
    named = settings.pop(0).removeprefix("--config-name=") if settings[0].startswith("--") else "ppo_trainer"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(named, overrides=settings)
    built = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert type(built) is kind
    assert config.actor_rollout_ref.model.external_lib == "verl_aspo"
    assert core_algos.get_policy_loss_fn(built.policy_loss.loss_mode).__module__ == "verl_aspo"
    assert (built.clip_ratio_low, built.clip_ratio_high, built.clip_ratio_c) == (0.2, 0.2, 3.0)
    assert built.ppo_mini_batch_size * 2 <= config.data.train_batch_size  # several updates per batch
    built.validate(config.trainer.nnodes * config.trainer.n_gpus_per_node, config.data.train_batch_size)
