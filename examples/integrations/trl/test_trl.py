"""Runs the adapter in TRL, with a tiny model on the CPU. Requires TRL."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from megatron_aspo.loss.objectives import find_objective

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(FOLDER))
from trl_aspo import ASPOTrainer  # noqa: E402

ROWS, PROMPT, LENGTH = 4, 3, 8


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *"abcdefgh"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(folder: Path) -> LlamaForCausalLM:
    """A model read from a folder, from which TRL also loads the reference policy."""
    torch.manual_seed(0)
    shape = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def reward(completions: list[str], **_: Any) -> list[float]:
    """The fraction of letters that are "a"."""
    return [text.split().count("a") / LENGTH for text in completions]


DATASET = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h"] * 8})


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    def make(kind: Any, **fields: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "num_generations": 2,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "max_completion_length": LENGTH,
            "use_bias_correction_kl": False,
        }
        config = GRPOConfig(**settings | fields)
        made = kind(
            model=model(tmp_path / "model"),
            reward_funcs=reward,
            args=config,
            train_dataset=DATASET,
            processing_class=tokenizer(),
        )
        made.current_gradient_accumulation_steps = 2
        made.model.train()
        return made

    return make


def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    mask = (torch.arange(LENGTH) < torch.tensor([8, 3, 6, 1])[:, None]).long()
    return {
        "prompt_ids": torch.randint(2, 10, (ROWS, PROMPT), generator=draw),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(2, 10, (ROWS, LENGTH), generator=draw),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, -2.0, 0.7]),
        "ref_per_token_logps": torch.randn(ROWS, LENGTH, generator=draw) - 2,
        "num_items_in_batch": 2 * mask.sum(),
        "tool_mask": (torch.rand(ROWS, LENGTH, generator=draw) < 0.8).long(),
    }


def gradient(one: Any, given: dict[str, Tensor]) -> Tensor:
    one.model.zero_grad()
    one._compute_loss(one.model, given).backward()
    return torch.cat([parameter.grad.flatten() for parameter in one.model.parameters()])


def test_the_version_is_the_one_that_the_page_names() -> None:
    assert f"With TRL {version('trl')} " in README


def test_trl_calls_what_is_overridden() -> None:
    """The adapter relies on these undocumented signatures."""
    assert list(inspect.signature(GRPOTrainer._compute_loss).parameters) == ["self", "model", "inputs"]
    assert "self._compute_loss(model, inputs)" in inspect.getsource(GRPOTrainer.compute_loss)
    names = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert names[1:5] == ["model", "input_ids", "attention_mask", "logits_to_keep"]
    assert "compute_entropy" in names


@pytest.mark.parametrize(("loss_type", "beta"), [("dapo", 0.3), ("grpo", 0.0), ("grpo", 0.3), ("dr_grpo", 0.3)])
def test_at_ratio_one_it_is_trls_own_gradient(trainer: Callable[..., Any], loss_type: str, beta: float) -> None:
    ours, theirs = (
        gradient(trainer(kind, loss_type=loss_type, beta=beta), inputs()) for kind in (ASPOTrainer, GRPOTrainer)
    )
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("anchor", ["old_per_token_logps", "sampling_per_token_logps"])
def test_at_other_ratios_it_is_aspos(trainer: Callable[..., Any], anchor: str) -> None:
    one, given = trainer(ASPOTrainer), inputs()
    sampled = anchor == "sampling_per_token_logps"
    if sampled:
        one = trainer(partial(ASPOTrainer, loss={"anchor": "rollout", "anchor_band": (0.3, 4)}))
    mask = given["completion_mask"] * given["tool_mask"]
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    attended = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    logits = one.model(input_ids=ids, attention_mask=attended).logits[:, PROMPT - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, given["completion_ids"][..., None])[..., 0]
    log_ratio = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(2))
    given["old_per_token_logps"] = logprobs.detach() + 1  # not used with the other anchor
    given[anchor] = logprobs.detach() - log_ratio
    correction = torch.ones(ROWS, 1)
    if sampled:
        given[anchor][0, 0] = torch.nan  # as TRL stores a log-prob that vLLM did not return
        log_ratio[0, 0] = 0
    else:
        correction = given["importance_sampling_ratio"] = torch.tensor([[1.0], [0.5], [2.0], [0.0]])
    r, advantages = log_ratio.exp(), given["advantages"][:, None]
    up = torch.where(r > 1.2, 0.0, (1 / r).clamp(max=3))
    down = torch.where(r < 0.8, 0.0, r.clamp(max=3))
    weight = torch.where(advantages > 0, up, down) * correction
    if sampled:
        weight = weight.masked_fill((r < 0.3) | (r > 4), 0)
    # One update uses two of the four generated micro-batches.
    loss = -(weight * advantages * logprobs * mask).sum() / (given["num_items_in_batch"] * 2 / 4)
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(one.model.parameters()))])
    torch.testing.assert_close(gradient(one, given), expected, rtol=1e-4, atol=1e-6)
    assert 0.1 < one._metrics["train"]["aspo/clip_fraction_neg"][0] < 0.9


def test_the_sampler_as_anchor_needs_its_log_probs_and_no_correction(trainer: Callable[..., Any]) -> None:
    one, given = trainer(partial(ASPOTrainer, loss={"anchor": "rollout"})), inputs()
    with pytest.raises(ValueError, match="rollout_logprobs is missing"):
        one._compute_loss(one.model, given)
    given |= {"sampling_per_token_logps": -torch.ones(ROWS, LENGTH), "importance_sampling_ratio": torch.ones(ROWS, 1)}
    with pytest.raises(ValueError, match="set vllm_importance_sampling_correction=False"):
        one._compute_loss(one.model, given)
    # TRL's own names and default, which the message corrects.
    assert GRPOConfig(output_dir="x", use_cpu=True, bf16=False).vllm_importance_sampling_correction
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'output["sampling_per_token_logps"] = sampling_per_token_logps' in source


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"loss_type": "cispo", "entropy_coef": 0.1},
            "loss_type=cispo (use dapo, grpo or dr_grpo), "
            "an entropy bonus (leave out entropy_coef and use_adaptive_entropy)",
        ),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            "importance_sampling_level=sequence (use token)",
        ),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile (leave it out)"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold (leave it out)"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "beta with use_bias_correction_kl (set it to False)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_taken_is_named(trainer: Callable[..., Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"does not take {re.escape(named)}; see its README"):
        trainer(ASPOTrainer, **fields)


def test_the_mean_is_named_by_loss_type(trainer: Callable[..., Any]) -> None:
    """The loss is divided as `loss_type` says: over another mean it would be wrong by a factor."""
    message = "ASPOTrainer does not take aggregation in loss (set loss_type to dapo, grpo or dr_grpo); see its README"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(partial(ASPOTrainer, loss={"aggregation": "seq-mean-token-mean"}), loss_type="dapo")


def test_a_mixtures_router_loss_has_to_be_turned_off(tmp_path: Path) -> None:
    """TRL uses the model's coefficient if none is set."""
    shape = {
        "vocab_size": 10,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
    }
    config = MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)
    given: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    given |= {"num_generations": 2, "per_device_train_batch_size": 2}
    rest = {"reward_funcs": reward, "train_dataset": DATASET, "processing_class": tokenizer()}
    with pytest.raises(ValueError, match=r"a mixture's router loss \(set router_aux_loss_coef=0.0\); see"):
        ASPOTrainer(model=MixtralForCausalLM(config), args=GRPOConfig(**given), **rest)
    ASPOTrainer(model=MixtralForCausalLM(config), args=GRPOConfig(**given, router_aux_loss_coef=0.0), **rest)


def test_a_sign_that_no_token_has_leaves_its_metrics_alone(trainer: Callable[..., Any]) -> None:
    """For example, a group with equal rewards: at ratio 1 the metric is 1, independent of other groups."""
    one = trainer(ASPOTrainer)
    for advantages in ([1.0, 0.5, 2.0, 0.7], [0.0, 0.0, 0.0, 0.0], [1.0, -0.5, -2.0, 0.7]):
        one._compute_loss(one.model, inputs() | {"advantages": torch.tensor(advantages)})
    one.log({})
    logged = one.state.log_history[-1]
    for name in ("ratio_pos", "ratio_neg", "weight_pos", "weight_neg"):
        assert logged[f"aspo/{name}"] == pytest.approx(1)
    dead = trainer(ASPOTrainer)
    dead._compute_loss(dead.model, inputs() | {"advantages": torch.zeros(ROWS)})
    dead.log({})
    assert dead.state.log_history[-1]["aspo/ratio_pos"] is None
    assert dead.state.log_history[-1]["aspo/nll"] > 1


def test_a_batch_that_is_wholly_masked_has_no_gradient(trainer: Callable[..., Any]) -> None:
    """`mask_truncated_completions` can produce such a batch."""
    given = inputs()
    given |= {"completion_mask": torch.zeros_like(given["completion_mask"]), "num_items_in_batch": torch.tensor(0)}
    assert gradient(trainer(ASPOTrainer), given).abs().max() == 0


def test_clips_are_the_trainers(trainer: Callable[..., Any]) -> None:
    made = trainer(ASPOTrainer, epsilon=0.1, epsilon_high=0.3, delta=2.5, loss_type="dr_grpo").policy_loss
    assert (made.clip_low, made.clip_high, made.dual_clip, made.norm_length) == (0.1, 0.3, 2.5, LENGTH)
    for loss, cap in (({}, 3.0), ({"objective": "tis"}, 2.0), ({"objective": "up"}, None), ({"dual_clip": 4.0}, 4.0)):
        assert find_objective(trainer(partial(ASPOTrainer, loss=loss)).policy_loss)[1].dual_clip == cap


def test_images_reach_the_model(trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter passes on all forward arguments that GRPOTrainer's own loss passes."""
    given: dict[str, Any] = dict(inputs())
    forward = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    for name in ("pixel_values", "image_grid_thw", "num_images", "token_type_ids", "mm_token_type_ids"):
        given[name] = object()
    calls = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(forward.bind(*args, **kwargs).arguments)
        raise InterruptedError

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", called)
    for kind in (ASPOTrainer, GRPOTrainer):
        with pytest.raises(InterruptedError):
            trainer(kind)._compute_loss(None, given)
    ours, theirs = calls
    passed = {name for name, value in theirs.items() if value is not None and value is not False}
    for name in passed - {"self", "input_ids", "attention_mask"}:
        assert ours[name] is theirs[name], name
    assert "pixel_values" in passed


# --- Two processes ---

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_trl import *

folder, results = Path(sys.argv[2]), {}
for kind in (ASPOTrainer, GRPOTrainer):
    fields = dict(num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    fields |= dict(max_completion_length=LENGTH, optim="sgd", learning_rate=1.0, logging_steps=1, save_strategy="no")
    fields |= dict(per_device_eval_batch_size=2, use_cpu=True, bf16=False, report_to="none", output_dir=str(folder))
    fields |= dict(loss_type="dapo", beta=0.1, use_bias_correction_kl=False)
    made = kind(
        model=LlamaForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=reward,
        args=GRPOConfig(**fields),
        train_dataset=DATASET,
        eval_dataset=DATASET.select(range(4)),
        processing_class=tokenizer(),
    )
    assert made.accelerator.num_processes == 2
    made.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])
    results[kind.__name__] = weights, made.state.log_history, made.evaluate()["eval_loss"]
if made.accelerator.is_main_process:
    torch.save(results, folder / "results.pt")
"""


def test_two_processes_train_and_evaluate_as_trls_own_at_ratio_one(tmp_path: Path) -> None:
    start = torch.cat([parameter.detach().flatten() for parameter in model(tmp_path / "model").parameters()])
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, tmp_path / "worker.py", FOLDER, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    (ours, log, evaluated), (theirs, their_log, their_evaluated) = (results[f"{k}Trainer"] for k in ("ASPO", "GRPO"))
    assert (theirs - start).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert abs(their_evaluated) > 1e-4  # not only from the advantages, whose group mean is 0
    assert evaluated == pytest.approx(their_evaluated, rel=1e-2)
    # TRL reports the mean over both processes.
    entropies = [
        [entry[name] for entry in entries if name in entry]
        for name, entries in (("aspo/entropy", log), ("entropy", their_log))
    ]
    assert len(entropies[0]) == 2
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)


# --- The page ---


def test_the_plain_loop_runs_and_learns() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    moved = (names["logprobs_of"](names["tokens"]) - names["old_logprobs"]).detach()
    mask, advantages = names["mask"], names["advantages"]
    assert float(moved[mask & (advantages > 0)].mean()) > 0.05
    assert float(moved[mask & (advantages < 0)].mean()) < -0.05


def test_the_pages_trainer_learns(tmp_path: Path) -> None:
    names: dict[str, Any] = {
        "model": model(tmp_path / "model"),
        "reward": reward,
        "dataset": DATASET,
        "tokenizer": tokenizer(),
    }
    names |= {"output_dir": str(tmp_path), "use_cpu": True, "ASPOTrainer": ASPOTrainer, "GRPOConfig": GRPOConfig}
    exec(blocks("python")[1].replace("max_steps=8", "max_steps=60").replace("1e-3", "1e-2"), names)
    history = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    assert (len(history), len(rewards)) == (60, 30)
    # Only the first update of a batch has ratio 1.
    assert history[0]["aspo/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert history[1]["aspo/approx_kl"] > 1e-5
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_accelerate_takes_the_pages_command() -> None:
    from accelerate.commands.launch import launch_command_parser

    (text,) = (block for block in blocks("bash") if "accelerate launch" in block)
    words = shlex.split(text.partition("accelerate launch")[2].replace("\\\n", " ").replace("$RANK", "0"))
    parsed = launch_command_parser().parse_args(words)
    assert (parsed.num_processes, parsed.training_script, parsed.training_script_args) == (32, "train.py", [])
