"""Reading a configuration: defaults, overrides, types, and what fields must agree on."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_aspo.config import ClusterConfig, ParallelConfig, PolicyLossConfig, RunConfig, to_dict
from megatron_aspo.config_checks import check_world_size, config_warnings
from megatron_aspo.config_file import load_config
from megatron_aspo.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))


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
    assert (loss.objective, loss.clip_low, loss.clip_high, loss.dual_clip) == ("aspo", 0.2, 0.2, 3.0)
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
    config = load_config(path, ["loss.clip_low=0.1", "train.steps=1", "train.steps=2"])
    assert (config.loss.clip_low, config.loss.clip_high, config.train.steps) == (0.1, 0.28, 2)


def test_interpolation(path: Path) -> None:
    config = load_config(path, ["data.seed=${seed}", "seed=5"])
    assert config.data.seed == 5


def test_round_trip(path: Path, tmp_path: Path) -> None:
    """What a run writes beside its results is a configuration that gives the same run."""
    config = load_config(path, ["rollout.stop=['x']", "data.task_args={a: 1}", "loss.dual_clip=null"])
    again = tmp_path / "again.yaml"
    again.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    assert load_config(again) == config


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_sound(example: Path) -> None:
    config = load_config(example)
    assert config_warnings(config) == []
    assert config.updates_per_step > 1


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 1


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
    """A mapping of sections fits no setting but data.task_args, and that is no list."""
    value = "[1]" if name == "data.task_args" else "{a: {b: 1}}"
    with pytest.raises(UserError) as error:
        load_config(path, [f"{name}={value}"])
    assert str(error.value).startswith(f"{name}=")


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-inf", ".inf", "1e999"])
@pytest.mark.parametrize("name", [name for name in _leaves(RunConfig) if name.endswith(("lr", "_coef", "clip"))])
def test_only_finite_numbers(path: Path, name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}=.* should be a finite number"):
        load_config(path, [f"{name}={value}"])


def test_dr_grpo_divides_by_the_longest_response(path: Path) -> None:
    overrides = ["loss.aggregation=seq-mean-token-sum-norm", "rollout.max_response_tokens=24"]
    assert load_config(path, overrides).loss.norm_length == 24
    assert load_config(path, [*overrides, "loss.norm_length=9"]).loss.norm_length == 9
    assert load_config(path).loss.norm_length is None


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
    assert len(warnings) == (updates == 1)
    if warnings:
        assert warnings[0].startswith("ASPO is inert: one optimizer update per rollout batch")
        assert "train.mini_batch_prompts" in warnings[0]
        assert "train.epochs" in warnings[0]


def test_staleness_warning(path: Path) -> None:
    stale = ["rollout.engine=vllm", "rollout.ranks=1", "rollout.max_staleness=1"]
    (warning,) = config_warnings(load_config(path, stale))
    assert "rollout.max_staleness=1" in warning
    assert "loss.rollout_correction=none" in warning
    assert config_warnings(load_config(path, [*stale, "loss.rollout_correction=truncate"])) == []
    assert config_warnings(load_config(path, stale[:2])) == []  # ranks of their own are not stale yet


def test_truncated_sampling_warning(path: Path) -> None:
    (warning,) = config_warnings(load_config(path, ["rollout.top_p=0.9"]))
    assert "rollout.top_p=0.9" in warning


@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "expert", "size", "ranks", "fits"),
    [
        (1, 1, 1, 1, 1, 1, True),
        (1, 1, 1, 1, 1, 3, True),
        (2, 2, 1, 1, 4, 4, True),
        (2, 2, 1, 1, 4, 8, True),
        (2, 1, 1, 1, 2, 1, False),
        (2, 2, 1, 1, 4, 6, False),
        (1, 1, 3, 1, 3, 6, True),
        (2, 1, 2, 1, 4, 4, True),
        (2, 1, 2, 1, 4, 6, False),
        (1, 1, 1, 2, 2, 4, True),
        (1, 2, 2, 2, 4, 4, True),
        (1, 2, 2, 2, 4, 6, False),
        (1, 1, 2, 4, 4, 2, False),
    ],
)
def test_world_size(
    path: Path, tensor: int, pipeline: int, context: int, expert: int, size: int, ranks: int, fits: bool
) -> None:
    layout = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
    overrides = [f"parallel.{name}={value}" for name, value in layout.items()]
    config = load_config(path, [*overrides, *(["model.num_experts=4"] if expert > 1 else [])])
    assert config.parallel.model_parallel_size == size
    if fits:
        check_world_size(config, ranks)
        return
    with pytest.raises(
        UserError,
        match=rf"{ranks} rank.*tensor={tensor} .*context={context} with parallel.expert={expert}; .*multiple of {size}",
    ):
        check_world_size(config, ranks)


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel", "context", "multiple"),
    [(2, False, 1, 1), (2, True, 1, 2), (1, False, 2, 4), (2, True, 2, 4), (4, True, 2, 8), (3, True, 2, 12)],
)
def test_what_a_stream_is_padded_to(tensor: int, sequence_parallel: bool, context: int, multiple: int) -> None:
    parallel = ParallelConfig(tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    assert parallel.stream_multiple == multiple


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "ppo"},
        {"aggregation": "mean"},
        {"kl_estimator": "k4"},
        {"clip_low": 1.0},
        {"clip_low": -0.1},
        {"clip_high": math.inf},
        {"clip_high": -0.1},
        {"dual_clip": 1.0},
        {"entropy_quantile": 1.1},
        {"high_entropy_clip": 1.0},
        {"sapo_tau_pos": 0.0},
        {"sapo_tau_neg": -1.0},
        {"kl_coef": -0.1},
        {"norm_length": 0},
        {"rollout_correction": "tis"},
        {"rollout_ratio_low": 2.0},
        {"rollout_ratio_low": -0.1},
        {"rollout_ratio_low": math.nan},
        {"rollout_ratio_high": 0.5},
        {"rollout_ratio_high": math.inf},
        {"rollout_sequence_low": -1.0},
        {"rollout_sequence_low": 1.0, "rollout_sequence_high": 1.0},
        {"rollout_sequence_high": 0.0},
        {"rollout_sequence_high": math.nan},
        {"rollout_veto": 0.0},
        {"rollout_veto": 1.0},
    ],
    ids=lambda f: ",".join(f"{name}={value}" for name, value in f.items()),
)
def test_the_loss_refuses(fields: dict[str, Any]) -> None:
    """The library's users get a ValueError that names the field."""
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
        PolicyLossConfig(**fields)
    assert not name.startswith("rollout") or f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "drops", "uses"),
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
def test_what_needs_the_samplers_logprobs(fields: dict[str, Any], drops: bool, uses: bool) -> None:
    config = PolicyLossConfig(**fields)
    assert (config.drops_responses, config.uses_rollout_logprobs) == (drops, uses)
