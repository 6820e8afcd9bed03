"""Reading a configuration: defaults, overrides, types, and consistency of fields."""

import contextlib
import math
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_aspo.config.checks import check_world_size, config_warnings
from megatron_aspo.config.load import load_config
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import ClusterConfig, RunConfig
from megatron_aspo.errors import UserError

EXAMPLES = sorted(p for p in (Path(__file__).parents[2] / "examples").rglob("*.yaml") if p.name != "claims.yaml")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("name: t\nloss: {clip_high: 0.28}\ntrain:\n  steps: 7\n")
    return file


def test_defaults_and_what_the_file_says(path: Path) -> None:
    config = load_config(path)
    assert config.loss == PolicyLossConfig(clip_high=0.28)
    assert config.train.steps == 7
    default = RunConfig(name="t")
    assert (config.model, config.rollout, config.optimizer) == (default.model, default.rollout, default.optimizer)
    assert config.run_dir == Path("runs/t")


def test_the_defaults_are_the_papers() -> None:
    loss, optimizer = PolicyLossConfig(), RunConfig(name="t").optimizer
    assert (loss.objective, loss.clip_low, loss.clip_high, loss.dual_clip) == ("aspo", 0.2, 0.2, "default")
    assert (loss.aggregation, loss.entropy_quantile, loss.kl_estimator) == ("token-mean", None, "k3")
    assert (optimizer.lr, optimizer.lr_warmup_updates, optimizer.weight_decay) == (1e-6, 10, 0.1)
    assert RunConfig(name="t").updates_per_step == 12


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("seed=3", None, "seed", 3),
        ("name=7", None, "name", "7"),
        ("output_dir=/a b/c", None, "output_dir", "/a b/c"),
        ("loss.clip_high=0.4", "loss", "clip_high", 0.4),
        ("loss.dual_clip=null", "loss", "dual_clip", None),
        ("loss.dual_clip=default", "loss", "dual_clip", "default"),
        ("loss.dual_clip=5", "loss", "dual_clip", 5.0),
        ("loss.entropy_quantile=0.8", "loss", "entropy_quantile", 0.8),
        ("loss.objective=cispo", "loss", "objective", "cispo"),
        ("optimizer.lr=1e-6", "optimizer", "lr", 1e-6),  # a string in YAML 1.1
        ("optimizer.lr=1.0e-6", "optimizer", "lr", 1e-6),
        ("train.packing=false", "train", "packing", False),
        ("rollout.stop=['a','b c']", "rollout", "stop", ("a", "b c")),
        ("data.task_args={a: [1, x]}", "data", "task_args", {"a": [1, "x"]}),
        ("data.task_args.a=1", "data", "task_args", {"a": 1}),
        ("data.prompt_template='{a} = {b}'", "data", "prompt_template", "{a} = {b}"),
        ("checkpoint.resume=auto", "checkpoint", "resume", "auto"),
    ],
)
def test_overrides(path: Path, override: str, section: str | None, field: str, value: Any) -> None:
    config: Any = load_config(path, [override])
    found = getattr(getattr(config, section) if section else config, field)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_sections_merge(path: Path) -> None:
    config = load_config(path, ["loss.clip_low=0.1", "train.steps=1", "train.steps=2", "data.seed=${seed}", "seed=5"])
    assert (config.loss.clip_low, config.loss.clip_high, config.train.steps, config.data.seed) == (0.1, 0.28, 2, 5)


def test_round_trip(path: Path, tmp_path: Path) -> None:
    """The configuration that a run writes beside its results gives the same run."""
    config = load_config(path, ["rollout.stop=['x']", "data.task_args={a: 1}", "loss.dual_clip=null"])
    again = tmp_path / "again.yaml"
    again.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    assert load_config(again) == config


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_sound(example: Path) -> None:
    config = load_config(example)
    assert config_warnings(config) == []
    assert config.updates_per_step > 1
    nodes = config.cluster.nodes if config.cluster else 1
    assert config.rollout.request_seeds is (nodes == 1)  # recipes of 30B and more share a generator


@pytest.mark.parametrize(
    "override",
    [
        "loss.clip_low=0",
        "loss.entropy_quantile=0",
        "loss.entropy_quantile=1",
        "rollout.top_p=1",
        "train.steps=0",
        "warmup.wrong_fraction=0",
        "rollout.max_response_tokens=127",
        "train.max_tokens_per_micro_batch=128",
        "seed=0",
        "seed=2147483647",
    ],
)
def test_values_on_the_boundary_are_taken(path: Path, override: str) -> None:
    load_config(path, [override])


def _leaves(cls: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for f in fields(cls):
        default: Any = f.default_factory() if callable(f.default_factory) else None
        default = ClusterConfig() if f.name == "cluster" else default
        found += _leaves(type(default), f"{prefix}{f.name}.") if is_dataclass(default) else [prefix + f.name]
    return found


@pytest.mark.parametrize("name", _leaves(RunConfig))
def test_every_setting_refuses_another_type(path: Path, name: str) -> None:
    """A mapping of sections is invalid for every setting except data.task_args, which rejects a list."""
    value = "[1]" if name == "data.task_args" else "{a: {b: 1}}"
    with pytest.raises(UserError) as error:
        load_config(path, [f"{name}={value}"])
    assert str(error.value).startswith(name)


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-inf", ".inf", "1e999"])
@pytest.mark.parametrize("name", [name for name in _leaves(RunConfig) if name.endswith(("lr", "_coef", "clip"))])
def test_only_finite_numbers(path: Path, name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{name}="):
        load_config(path, [f"{name}={value}"])


def test_dr_grpo_divides_by_the_longest_response(path: Path) -> None:
    overrides = ["loss.aggregation=seq-mean-token-sum-norm", "rollout.max_response_tokens=24"]
    assert load_config(path, overrides).loss.norm_length == 24
    assert load_config(path, [*overrides, "loss.norm_length=9"]).loss.norm_length == 9
    assert load_config(path).loss.norm_length is None
    loss = PolicyLossConfig(aggregation="seq-mean-token-sum-norm")
    assert RunConfig(name="t", loss=loss, rollout=RolloutConfig(max_response_tokens=24)).loss.norm_length == 24


@pytest.mark.parametrize(("recompute", "warned"), [("none", True), ("selective", False), ("full", False)])
def test_recomputed_modules_without_recomputation(path: Path, recompute: str, warned: bool) -> None:
    """A recipe's list survives another `train.recompute`, and a list alone is warned of."""
    settings = ["train.recompute_modules=[mlp,core_attn]", f"train.recompute={recompute}"]
    told = [line for line in config_warnings(load_config(path, settings)) if "recompute" in line]
    expected = "train.recompute_modules=[mlp, core_attn] does nothing with train.recompute=none; set selective"
    assert told == [expected] * warned


@pytest.mark.parametrize(
    ("prompts", "mini", "epochs", "updates"), [(32, 8, 3, 12), (10, 4, 1, 3), (8, 8, 1, 1), (8, 8, 2, 2)]
)
def test_inert_warning(path: Path, prompts: int, mini: int, epochs: int, updates: int) -> None:
    config = load_config(
        path,
        [f"rollout.prompts_per_step={prompts}", f"train.mini_batch_prompts={mini}", f"train.epochs={epochs}"],
    )
    assert config.updates_per_step == updates
    warnings = config_warnings(config)
    assert ["ASPO is inert" in warning for warning in warnings] == [True] * (updates == 1)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("", ["every importance ratio is 1 and", "lower train.mini_batch_prompts or raise train.epochs"]),
        ("loss.objective=gmpo", ["GMPO is inert"]),
        ("loss.objective=dppo_kl", ["DPPO_KL is inert"]),
        (
            "rollout.oversample=2",
            [
                "with rollout.oversample=2 set loss.anchor=rollout",
                "all 24 runs of the study on rollouts 1 to 8 steps old collapsed",
            ],
        ),
        (
            "rollout.engine=vllm rollout.ranks=1 rollout.max_staleness=4",
            ["with rollout.max_staleness=4 set loss.anchor=rollout", "steps old collapsed (lr 5e-4, docs/evidence.md)"],
        ),
        (
            "rollout.oversample=2 loss.rollout_correction=truncate",
            ["with truncated weights alone 18 of 24 runs of the study on rollouts 1 to 8 steps old collapsed"],
        ),
        ("rollout.oversample=2 loss.rollout_correction=mask", ["set loss.anchor=rollout, whose ratio acts"]),
        ("loss.anchor=rollout", ["every importance ratio is apart from rounding 1 and", "lower train.mini"]),
        ("rollout.oversample=2 loss.anchor=rollout", []),
    ],
)
def test_what_one_update_makes_inert(path: Path, overrides: str, parts: list[str]) -> None:
    one = ["rollout.prompts_per_step=8", "train.mini_batch_prompts=8", "train.epochs=1"]
    warnings = config_warnings(load_config(path, [*one, *overrides.split()]))
    assert len(warnings) == bool(parts)
    for part in parts:
        assert part in warnings[0]
    assert ("collapsed" in str(warnings)) == any("collapsed" in part for part in parts)


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        (
            "loss.objective=gspo loss.dual_clip=3 loss.rollout_ratio_high=5",
            [
                "loss.dual_clip=3.0 has no effect with objective=gspo",
                "loss.rollout_ratio_high=5.0 has no effect with rollout_correction=none",
            ],
        ),
        ("loss.objective=gspo loss.dual_clip=null", []),
        (
            "loss.objective=sapo loss.entropy_quantile=0.8",
            ["loss.entropy_quantile=0.8 has no effect with objective=sapo"],
        ),
        ("loss.objective=sapo loss.entropy_quantile=0.8 loss.kl_tokens=low_entropy loss.kl_coef=0.1", []),
        (
            "loss.entropy_quantile=0.8 loss.kl_tokens=low_entropy",
            ["loss.kl_tokens=low_entropy has no effect with kl_coef=0"],
        ),
        (
            "loss.rollout_correction=truncate loss.rollout_ratio_low=0.3 loss.rollout_ratio_high=5",
            ["loss.rollout_ratio_low=0.3 has no effect with rollout_correction=truncate"],
        ),
    ],
)
def test_warnings_about_settings_without_effect(path: Path, overrides: str, warnings: list[str]) -> None:
    assert config_warnings(load_config(path, overrides.split())) == warnings


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        ("rollout.top_p=0.9", "rollout.top_p=0.9"),
        ("rollout.engine=vllm rollout.ranks=1", None),  # separate rollout ranks alone are not stale
        ("rollout.engine=vllm rollout.ranks=1 rollout.max_staleness=1", "loss.rollout_correction=none"),
        ("rollout.oversample=1.5", "rollout.oversample=1.5"),
        ("rollout.engine=vllm model.dtype=bfloat16 rollout.quantization=fp8", "rollout.quantization=fp8"),
        ("rollout.engine=vllm rollout.ranks=1 rollout.max_staleness=1 loss.rollout_correction=truncate", None),
        ("rollout.oversample=1.5 loss.anchor=rollout", None),
        ("rollout.engine=vllm loss.anchor=rollout", "such as [0.2, 5]"),
        ("model.num_experts=4 loss.anchor=rollout", "other experts"),
        ("model.hf_path=x loss.anchor=rollout", None),  # float32 of the training model itself
        ("model.hf_path=x model.dtype=bfloat16 loss.anchor=rollout", "bfloat16"),
        ("model.hf_path=x rollout.engine=vllm loss.anchor=rollout", "experts needs train.router_replay=sampler, too"),
        ("rollout.engine=vllm loss.anchor=rollout", "(rollout.engine=vllm)"),
        (
            "model.hf_path=x rollout.engine=vllm train.router_replay=sampler loss.anchor=rollout",
            "(rollout.engine=vllm)",
        ),
        ("model.num_experts=4 loss.anchor=rollout loss.anchor_band=[0.2,5]", None),
        ("rollout.engine=vllm model.dtype=bfloat16 rollout.quantization=fp8 loss.anchor=rollout", "engine=vllm"),
        ("rollout.top_p=0.9 loss.anchor=rollout", "corrects for the wrong policy"),
        (
            "rollout.engine=vllm rollout.top_k=5 loss.anchor=rollout loss.anchor_band=[0.2,5]",
            "lie below 1 by the share that it leaves out",
        ),
    ],
)
def test_warnings_about_the_sampler(path: Path, overrides: str, setting: str | None) -> None:
    warnings = config_warnings(load_config(path, overrides.split()))
    assert [setting in warning for warning in warnings if setting] == ([True] if setting else [])
    assert len(warnings) == (setting is not None)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "expert", "size"),
    [
        (1, 1, 1, 1, 1),
        (2, 2, 1, 1, 4),
        (1, 1, 3, 1, 3),
        (2, 1, 2, 1, 4),
        (1, 1, 1, 2, 2),
        (1, 2, 2, 2, 4),
        (1, 1, 2, 4, 4),
    ],
)
def test_world_size(path: Path, tensor: int, pipeline: int, context: int, expert: int, size: int) -> None:
    layout = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
    overrides = [f"parallel.{name}={value}" for name, value in layout.items()]
    config = load_config(path, [*overrides, *(["model.num_experts=4"] if expert > 1 else [])])
    assert config.parallel.model_parallel_size == size
    for ranks in range(1, 9):
        refusal = pytest.raises(
            UserError, match=rf"^{ranks} rank.*tensor={tensor} .*; start a multiple of {size} ranks"
        )
        with refusal if ranks % size else contextlib.nullcontext():
            check_world_size(config.parallel, config.rollout, ranks)


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "context", "multiple"),
    [(2, False, 1, 1), (2, True, 1, 2), (1, False, 2, 4), (2, True, 2, 4), (4, True, 2, 8), (3, True, 2, 12)],
)
def test_what_a_stream_is_padded_to(tensor: int, sequence_parallel: bool, context: int, multiple: int) -> None:
    parallel = ParallelConfig(tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    assert parallel.stream_multiple == multiple


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("objective", ["ppo"]),
        ("aggregation", ["mean"]),
        ("kl_estimator", ["k4"]),
        ("clip_low", [1.0, -0.1]),
        ("clip_high", [math.inf, -0.1]),
        ("dual_clip", [1.0]),
        ("entropy_quantile", [1.1]),
        ("high_entropy_clip", [1.0]),
        ("sapo_tau_pos", [0.0]),
        ("sapo_tau_neg", [-1.0]),
        ("kl_coef", [-0.1]),
        ("norm_length", [0]),
        ("rollout_correction", ["tis"]),
        ("rollout_ratio_low", [2.0, -0.1, math.nan]),
        ("rollout_ratio_high", [0.5, math.inf]),
        ("rollout_sequence_low", [-1.0]),
        ("rollout_sequence_high", [0.0, math.nan]),
        ("rollout_veto", [0.0, 1.0]),
    ],
)
def test_the_loss_refuses(name: str, values: list[Any]) -> None:
    """Library users get a ValueError that names the field and its value."""
    for value in values:
        with pytest.raises(ValueError, match=rf"\b{name}={value!r}"):
            PolicyLossConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "drops", "corrects"),
    [
        ({}, False, False),
        ({"rollout_correction": "truncate"}, False, True),
        ({"rollout_correction": "mask", "rollout_ratio_low": 0.0}, False, True),
        ({"rollout_sequence_low": 0.5}, True, True),
        ({"rollout_sequence_high": 2.0}, True, True),
        ({"rollout_veto": 1e-4}, True, True),
        ({"rollout_sequence_low": 0.0}, False, False),
    ],
    ids=str,
)
def test_settings_that_correct_the_mismatch(fields: dict[str, Any], drops: bool, corrects: bool) -> None:
    config = PolicyLossConfig(**fields)
    assert (config.drops_responses, config.corrects_rollout) == (drops, corrects)
