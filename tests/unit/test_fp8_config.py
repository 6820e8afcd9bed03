"""Requirements of FP8 on configuration, layout and GPU; padding of packed streams."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_aspo.commands.check_rollout import is_sound
from megatron_aspo.config.checks import config_warnings
from megatron_aspo.config.fp8 import Fp8Config, check_fp8_device, check_fp8_layout
from megatron_aspo.config.load import load_config
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import UserError

ON_GPU = ["model.dtype=bfloat16", "rollout.engine=vllm"]
MULTIPLE = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}

LLAMA = {
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "num_layers": 32,
    "num_experts": 0,
    "dense_layers": 32,
}
EXPERTS = {"num_experts": 8, "moe_ffn_hidden_size": 768, "dense_layers": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: test\n")
    return path


@pytest.mark.parametrize("recipe", MULTIPLE)
@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_each_rank_has_a_multiple_of_the_recipe(
    recipe: Any, context: int, tensor: int, sequence_parallel: bool
) -> None:
    """The shard of a packed stream that a rank multiplies, after context and sequence parallelism."""
    parallel = ParallelConfig(tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    config = RunConfig(name="test", parallel=parallel, fp8=Fp8Config(recipe=recipe))
    # The least common multiple with the layout's own requirement.
    step = context * (tensor if sequence_parallel else 1) * MULTIPLE[recipe]
    assert config.stream_multiple == next(n for n in itertools.count(step, step) if n % parallel.stream_multiple == 0)


@pytest.mark.parametrize(
    "settings",
    [
        "fp8.recipe=tensorwise",
        "fp8.format=e5m2",
        "fp8.bf16_layers_at_start=-1",
        "fp8.recipe=delayed fp8.amax_history=0",
        "fp8.recipe=current fp8.amax_history=4",
        "fp8.recipe=delayed fp8.bf16_layers_at_end=1",
        "model.dtype=bfloat16 rollout.engine=vllm fp8.recipe=current fp8.bf16_layers_at_start=3",  # of 2 layers
        "fp8.recipe=current",  # in float32
        "model.dtype=bfloat16 rollout.engine=megatron fp8.recipe=current",
        "model.dtype=bfloat16 rollout.engine=vllm fp8.recipe=blockwise",  # 64 wide
        "model.dtype=bfloat16 rollout.engine=vllm fp8.recipe=mxfp8 train.max_tokens_per_micro_batch=120",
        "rollout.quantization=fp8",
        "rollout.engine=vllm rollout.quantization=fp8",
        "fp8.emulate=true",  # of an older version
    ],
)
def test_refusals(path: Path, settings: str) -> None:
    name = settings.split()[-1].partition("=")[0].partition(".")[2]
    with pytest.raises(UserError, match=name):
        load_config(path, settings.split())


def test_what_is_taken(path: Path) -> None:
    config = load_config(path, [*ON_GPU, "fp8.recipe=current", "fp8.bf16_layers_at_end=1"])
    assert config.fp8 == Fp8Config(recipe="current", bf16_layers_at_end=1)
    assert config.fp8.mcore_recipe == "tensorwise"
    assert load_config(path, ["fp8.recipe=null"]).fp8.recipe is None


@pytest.mark.parametrize(
    ("recipe", "tensor", "changed", "said"),
    [
        ("blockwise", 8, {}, None),
        ("mxfp8", 8, {}, None),
        ("current", 8, {}, None),
        ("blockwise", 16, {"num_query_groups": 16}, None),
        ("blockwise", 1, {"hidden_size": 4000}, "model.hidden_size is 4000"),
        ("blockwise", 8, {"ffn_hidden_size": 11008}, "model.ffn_hidden_size / parallel.tensor is 1376"),
        ("mxfp8", 8, {"ffn_hidden_size": 11008}, None),
        ("mxfp8", 16, {"ffn_hidden_size": 11008}, "model.ffn_hidden_size / parallel.tensor is 688"),
        ("current", 16, {"ffn_hidden_size": 11008}, None),
        ("blockwise", 8, {"num_attention_heads": 40, "kv_channels": 64}, "the heads' width / parallel.tensor is 320"),
        ("blockwise", 8, EXPERTS, "model.moe_ffn_hidden_size / parallel.expert_tensor is 96"),
        ("blockwise", 2, EXPERTS, None),
        ("blockwise", 2, EXPERTS | {"ffn_hidden_size": 100}, None),  # no layer has it
        ("blockwise", 1, EXPERTS | {"dense_layers": 1, "ffn_hidden_size": 10944}, "ffn_hidden_size / parallel.tensor"),
        ("blockwise", 2, EXPERTS | {"shared_expert_size": 1408}, "shared_expert_size / parallel.tensor is 704"),
    ],
)
def test_shapes(recipe: Any, tensor: int, changed: dict[str, int], said: str | None) -> None:
    arguments = (LLAMA | changed, Fp8Config(recipe=recipe), ParallelConfig(tensor=tensor), "model.")
    if said is None:
        check_fp8_layout(*arguments)
        return
    with pytest.raises(UserError, match=rf"fp8.recipe={recipe} .* {MULTIPLE[recipe]}, .*{re.escape(said)}"):
        check_fp8_layout(*arguments)


def test_whole_experts_on_every_rank() -> None:
    """Qwen3-30B-A3B: 768 is a multiple of 128, a quarter of it is not."""
    sizes = LLAMA | EXPERTS
    check_fp8_layout(sizes, Fp8Config(recipe="blockwise"), ParallelConfig(tensor=4, expert_tensor=1), "")
    with pytest.raises(UserError, match=r"moe_ffn_hidden_size / parallel.expert_tensor is 192"):
        check_fp8_layout(sizes, Fp8Config(recipe="blockwise"), ParallelConfig(tensor=4), "")


@pytest.mark.parametrize(
    ("first", "at_start", "said"),
    [(3, 4, "bf16_layers_at_start=4 exceeds the 3 layers"), (3, 3, None), (None, 8, None), (None, 9, "the 8 layers")],
)
def test_layers_in_bfloat16_are_on_the_first_stage(first: int | None, at_start: int, said: str | None) -> None:
    parallel = ParallelConfig(pipeline=4, first_stage_layers=first)
    fp8 = Fp8Config(recipe="current", bf16_layers_at_start=at_start)
    if said is None:
        check_fp8_layout(LLAMA, fp8, parallel, "")
        return
    with pytest.raises(UserError, match=said):
        check_fp8_layout(LLAMA, fp8, parallel, "")


@pytest.mark.parametrize(
    ("capability", "cuda", "recipes"),
    [
        ((8, 0), (13, 0), []),
        ((8, 9), (12, 4), ["delayed", "current"]),
        ((9, 0), (12, 8), ["delayed", "current"]),
        ((9, 0), (12, 9), ["delayed", "current", "blockwise"]),
        ((10, 0), (12, 8), ["delayed", "current", "mxfp8"]),
        ((12, 0), (13, 0), ["delayed", "current", "blockwise"]),
        (None, (13, 0), []),
    ],
)
def test_recipes_of_gpus(capability: tuple[int, int] | None, cuda: tuple[int, int], recipes: Any) -> None:
    recipe: Any
    for recipe in MULTIPLE:
        refusal = pytest.raises(UserError, match=rf"^fp8\.recipe={recipe} ")
        with contextlib.nullcontext() if recipe in recipes else refusal:
            check_fp8_device(Fp8Config(recipe=recipe), capability, cuda)


def test_delayed_scaling_is_warned_of(path: Path) -> None:
    inert = len(config_warnings(load_config(path, ON_GPU)))
    (*_, warning) = config_warnings(load_config(path, [*ON_GPU, "fp8.recipe=delayed"]))
    assert "the first importance ratios are not 1" in warning
    recomputed = [*ON_GPU, "fp8.recipe=delayed", "train.recompute=full"]
    assert len(config_warnings(load_config(path, recomputed))) == inert + 1
    (*_, warning) = config_warnings(load_config(path, [*recomputed, "fp8.amax_history=3"]))
    assert "fp8.amax_history=3" in warning
    assert len(config_warnings(load_config(path, [*ON_GPU, "fp8.recipe=mxfp8"]))) == inert


BFLOAT16: dict[str, Any] = {"model": ModelConfig(dtype="bfloat16")}
QUANTIZED: dict[str, Any] = {"rollout": RolloutConfig(engine="vllm", quantization="fp8")}


@pytest.mark.parametrize(
    ("settings", "mean", "sound"),
    [
        ({}, 0.01, False),
        (BFLOAT16, 0.05, True),
        (BFLOAT16, 0.2, False),
        (BFLOAT16 | {"fp8": Fp8Config(recipe="current")}, 0.28, True),
        (BFLOAT16 | {"fp8": Fp8Config(recipe="current")}, 0.4, False),
        (QUANTIZED, 0.29, True),
        (QUANTIZED, 0.31, False),
        (QUANTIZED | {"fp8": Fp8Config(recipe="mxfp8")}, 0.42, True),
        (QUANTIZED | {"fp8": Fp8Config(recipe="mxfp8")}, 0.43, False),
    ],
)
def test_what_a_check_of_the_sampler_takes_for_rounding(settings: dict[str, Any], mean: float, sound: bool) -> None:
    config = RunConfig(name="test", **settings)
    assert is_sound({"logprob_diff": mean, "kl": mean**2 / 2}, config) == sound
