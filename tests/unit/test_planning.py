"""Numbers of a plan before it rehearses: shapes, the engine's memory and speed, roles, settings, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_aspo import cli
from megatron_aspo.config.checks import chunk_layers, stage_layers
from megatron_aspo.config.load import load_config
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.data.tokenizer import text_settings
from megatron_aspo.errors import UserError
from megatron_aspo.tools.planning.architectures import PUBLIC, shape_of, shape_of_hf
from megatron_aspo.tools.planning.engine import (
    RUNTIME,
    active_parameters,
    beside,
    decode_seconds,
    engine_parameters,
    generator_memory,
    host_beside,
    kv_bytes_per_token,
    state_bytes,
)
from megatron_aspo.tools.planning.gpus import GIB, KNOWN
from megatron_aspo.tools.planning.plan import make_plan, remedies
from megatron_aspo.tools.rehearsal.run import neighbour, role_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("*.yaml") if "cluster:" in path.read_text())


def shape(name: str) -> Any:
    return shape_of_hf(PUBLIC[name], name)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # in billions, from the model cards
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78, None),
        ("Qwen/Qwen2.5-32B-Instruct", 32.76, None),
        ("Qwen/Qwen3-8B", 8.19, None),
        ("Qwen/Qwen3-32B", 32.76, None),
        ("Qwen/Qwen2.5-72B-Instruct", 72.71, None),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.55, None),
        ("Qwen/Qwen3-30B-A3B", 30.53, 3.3),
        ("Qwen/Qwen3-235B-A22B", 235.09, 22.2),
        ("deepseek-ai/DeepSeek-V3", 671.03, 37.5),
        ("zai-org/GLM-4.5-Air", 106.85, None),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79.674, 3.875),
    ],
)
def test_public_totals(name: str, total: float, active: float | None) -> None:
    assert engine_parameters(shape(name), 1) / 1e9 == pytest.approx(total, abs=0.006)
    if active:  # the cards count the embedding's table too
        table = shape(name).vocab_size * shape(name).hidden_size
        assert (active_parameters(shape(name)) + table) / 1e9 == pytest.approx(active, abs=0.1)


def test_non_embedding_parameters_are_those_of_the_model_cards() -> None:
    for name, expected in (("Qwen/Qwen2.5-32B", 31.0), ("Qwen/Qwen3-32B", 31.2), ("Qwen/Qwen2.5-72B", 70.0)):
        s = shape(name)
        rest = engine_parameters(s, 1) - 2 * s.vocab_size * s.hidden_size
        assert rest / 1e9 == pytest.approx(expected, abs=0.3)


def test_the_engine_holds_the_model_and_repeats_few_key_value_heads() -> None:
    s = shape("Qwen/Qwen2.5-32B")
    assert engine_parameters(s, 8) == pytest.approx(engine_parameters(s, 1) / 8, rel=1e-3)
    moe = shape("Qwen/Qwen3-235B-A22B")  # 4 key-value heads
    assert kv_bytes_per_token(moe, 4) == kv_bytes_per_token(moe, 8) == 94 * 2 * 128 * 2
    assert kv_bytes_per_token(s, 1) == 64 * 2 * 8 * 128 * 2
    assert kv_bytes_per_token(shape("deepseek-ai/DeepSeek-V3"), 8) == 61 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("layers", "settings", "expected"),
    [
        (64, {"pipeline": 4}, [16] * 4),
        (64, {"pipeline": 4, "first_stage_layers": 15, "last_stage_layers": 15}, [15, 17, 17, 15]),
        (94, {"pipeline": 8, "first_stage_layers": 11, "last_stage_layers": 11}, [11] + [12] * 6 + [11]),
        (61, {"pipeline": 16, "first_stage_layers": 3, "last_stage_layers": 2}, [3] + [4] * 14 + [2]),
        (5, {"pipeline": 2, "last_stage_layers": 1}, [4, 1]),
        (5, {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 3}, [2, 3]),
    ],
)
def test_stage_layers(layers: int, settings: dict[str, Any], expected: list[int]) -> None:
    assert stage_layers(layers, ParallelConfig(**settings)) == expected


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (64, {"pipeline": 5}),
        (64, {"pipeline": 4, "first_stage_layers": 14}),
        (4, {"pipeline": 2, "first_stage_layers": 4}),
        (4, {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 2}),
    ],
)
def test_stages_that_do_not_add_up(layers: int, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"num_layers={layers}"):
        stage_layers(layers, ParallelConfig(**settings))


def test_layers_of_virtual_stages() -> None:
    """Stages take turns, also stages of unequal layers; the training model does not sample in turns."""
    even = ParallelConfig(pipeline=2, virtual_pipeline=2)
    uneven = ParallelConfig(pipeline=3, virtual_pipeline=2, first_stage_layers=2, last_stage_layers=2)
    assert chunk_layers(8, even) == [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert chunk_layers(8, uneven) == [
        [range(1), range(4, 5)],
        [range(1, 3), range(5, 7)],
        [range(3, 4), range(7, 8)],
    ]
    assert chunk_layers(8, ParallelConfig(pipeline=2)) == [[range(4)], [range(4, 8)]]
    with pytest.raises(UserError, match=r"num_layers=6 cannot be cut into parallel.virtual_pipeline=2 equal chunks"):
        stage_layers(6, even)
    settings = ["parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.num_layers=4"]
    with pytest.raises(UserError, match=r"parallel.virtual_pipeline=2 needs rollout.engine=vllm"):
        load_config(EXAMPLES / "demo_chain_sum.yaml", settings)


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(EXAMPLES / f"{name}.yaml", overrides)


def test_the_engine_beside_the_policy() -> None:
    """Qwen2.5-32B on TP 4, by hand: 64 layers of hidden 5,120 with 40 and 8 heads of 128, feed-forward 27,648."""
    config = recipe("qwen2_5_32b")
    s = shape(config.model.hf_path)
    layer = 2 * 5120 + (5120 + 2 * 1024) // 4 * 5121 + 5120 * 5120 // 4 + 3 * 5120 * 27648 // 4
    table = 152064 // 4 * 5120
    weights = 2 * (64 * layer + 2 * table + 5120)
    logits = 3 * 256 * 152064 * 4
    awake = beside(config, s, "awake", 0)
    assert awake == {
        "runtime (assumed)": RUNTIME,
        "vLLM weights": weights,
        "KV cache": 20 * GIB,
        "vLLM activations": 16384 * (4 * 5120 + 3 * 27648 // 4) * 2 + logits,
    }
    module = 152064 * 5120 * 2  # the embedding is larger than a pair of gate and up
    assert beside(config, s, "refit", 0) == {
        "runtime (assumed)": RUNTIME,
        "vLLM weights": weights,
        "refit bucket": 512 << 20,
        "module being loaded": module + module // 4,
    }
    assert beside(config, s, "asleep", 0) == {"runtime (assumed)": RUNTIME}
    light = recipe("qwen2_5_32b", "rollout.sleep_level=0")
    assert beside(light, s, "asleep", 0) == {name: awake[name] for name in awake if name != "vLLM activations"}
    assert beside(light, s, "refit", 0)["KV cache"] == 20 * GIB
    assert host_beside(config, s) == 0
    assert host_beside(recipe("qwen2_5_32b", "rollout.sleep_level=1"), s) == weights
    fp8 = beside(recipe("qwen2_5_32b", "rollout.quantization=fp8"), s, "asleep", 0)
    assert fp8 == beside(config, s, "asleep", 0)
    fp8 = beside(recipe("qwen2_5_32b", "rollout.quantization=fp8"), s, "awake", 0)
    assert weights - fp8["vLLM weights"] == 64 * layer + 5120  # embedding and head stay in bfloat16


def test_the_experts_of_a_layer_are_loaded_whole() -> None:
    """DeepSeek-V3: 256 experts of three matrices of 7,168 x 2,048, and the shard of one of 32 ranks."""
    config = recipe("deepseek_v3_671b")
    experts = 256 * 3 * 7168 * 2048 * 2
    refit = beside(config, shape(config.model.hf_path), "refit", 3)
    assert refit["module being loaded"] == experts + experts // 32


def test_ranks_that_only_generate() -> None:
    together, apart = recipe("qwen2_5_32b"), recipe("qwen2_5_32b", "rollout.ranks=8", "rollout.max_staleness=1")
    s = shape(apart.model.hf_path)
    assert all(beside(apart, s, state, 0) == {"runtime (assumed)": RUNTIME} for state in ("awake", "refit", "asleep"))
    phases = generator_memory(apart, s)
    assert phases["rollout"] == beside(together, s, "awake", 0)
    assert phases["refit"] == beside(together, s, "refit", 0) | {"KV cache": 20 * GIB}
    assert generator_memory(together, s) == {}
    with pytest.raises(UserError, match="8 ranks more than a multiple of 8"):
        make_plan(recipe("qwen2_5_32b", "rollout.ranks=8"), 36)


def test_seconds_of_sampling_by_hand() -> None:
    """Qwen2.5-32B, 8 replicas on TP 4 that sample 128 responses each at once, all of 8,192 tokens: a step reads the
    weights and on average 6,144 tokens of cache a response."""
    config = recipe("qwen2_5_32b", "rollout.kv_cache_gb=90")
    s, gpu = shape(config.model.hf_path), KNOWN["h100"]
    moved = 2 * engine_parameters(s, 4) + 128 * kv_bytes_per_token(s, 4) * 6144
    slowest, fastest = decode_seconds(config, s, gpu, 32, 1.0)
    assert slowest == pytest.approx(8192 * (moved / (0.35 * 3.35e12) + 0.02))
    assert fastest == pytest.approx(8192 * (moved / (0.7 * 3.35e12) + 0.006))
    half, _ = decode_seconds(recipe("qwen2_5_32b", "rollout.kv_cache_gb=10"), s, gpu, 32, 1.0)
    assert half > 1.5 * slowest  # a cache for fewer responses: they take turns


def test_states_of_delta_nets_by_hand() -> None:
    """Qwen3-Next on TP 8: in 36 layers 4 heads of [128, 128] in float32, and 3 inputs of 1,024 channels."""
    config = recipe("qwen3_next_80b_a3b")
    s, gpu = shape(config.model.hf_path), KNOWN["h100"]
    state = 36 * (4 * 128 * 128 * 4 + 3 * 1024 * 2)
    assert state_bytes(s, 8) == state == 9_658_368
    assert state_bytes(shape("Qwen/Qwen3-32B"), 8) == 0
    # Whole responses: the cache holds 95 of 256 at once, which take turns.
    kv = 12 * 2 * 256 * 2
    room = 12 * GIB / (kv * 10240 + state)
    moved = beside(config, s, "awake", 0)["vLLM weights"] + room * (kv * 6144 + 2 * state)
    slowest, _ = decode_seconds(config, s, gpu, 32, 1.0)
    assert slowest == pytest.approx(256 / room * 8192 * (moved / (0.35 * 3.35e12) + 0.02))
    with pytest.raises(UserError, match=r"make it at least 0\.13"):
        make_plan(recipe("qwen3_next_80b_a3b", "rollout.kv_cache_gb=0.12"))


def test_there_are_the_recipes_that_are_promised() -> None:
    planned = {load_config(path).model.hf_path for path in RECIPES}
    assert planned == {
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "Qwen/Qwen2.5-32B-Instruct",
        "Qwen/Qwen3-32B",
        "Qwen/Qwen2.5-72B-Instruct",
        "meta-llama/Llama-3.3-70B-Instruct",
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-235B-A22B",
        "deepseek-ai/DeepSeek-V3",
        "zai-org/GLM-4.5-Air",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
    }


@pytest.mark.parametrize(
    ("name", "ranks", "other"),
    [
        ("archer2_math", [0], 1),
        ("qwen2_5_32b", [0], 1),
        ("qwen3_32b", [0, 8, 24], 1),  # stages 1 and 2 have 16 layers each
        ("qwen3_235b_a22b", [0, 16, 112], 1),
        ("deepseek_v3_671b", [0, 16, 240], 1),
        ("qwen3_next_80b_a3b", [0, 8, 24], 1),  # three layers with attention in every stage
    ],
)
def test_rehearsed_roles(name: str, ranks: list[int], other: int) -> None:
    plan = make_plan(recipe(name))
    assert role_ranks(plan.config, plan.shape, plan.world) == ranks
    assert neighbour(plan.config, plan.world) == other


@pytest.mark.parametrize(
    ("parallel", "other"),
    [
        (ParallelConfig(tensor=2, context=2), 2),
        (ParallelConfig(tensor=2, expert=2, expert_tensor=2), 2),
        (ParallelConfig(tensor=2, context=2, expert=4, expert_tensor=1), 1),
        (ParallelConfig(pipeline=4), 0),
    ],
)
def test_the_neighbour_is_of_the_same_group(parallel: ParallelConfig, other: int) -> None:
    assert neighbour(replace(recipe("qwen3_30b_a3b"), parallel=parallel), 4) == other


def test_a_stage_with_fewer_delta_nets_has_a_role() -> None:
    """Every fourth layer has attention: in stages of six layers, one or two."""
    s = replace(shape("Qwen/Qwen3-Next-80B-A3B-Instruct"), num_layers=24)
    config = replace(recipe("qwen3_next_80b_a3b"), parallel=ParallelConfig(pipeline=4))
    assert role_ranks(config, s, 4) == [0, 1, 2, 3]
    assert kv_bytes_per_token(s, 1) == 6 * 2 * 2 * 256 * 2  # two of the layers' heads


def test_a_stage_with_fewer_experts_has_a_role() -> None:
    """Three dense layers in stages of two."""
    s = replace(shape("deepseek-ai/DeepSeek-V3"), num_layers=10)
    config = replace(recipe("deepseek_v3_671b"), parallel=ParallelConfig(pipeline=5, expert=2))
    assert role_ranks(config, s, 10) == [0, 2, 4, 8]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_engines_weights_are_those_of_the_comment(path: Path) -> None:
    plan = make_plan(load_config(path))
    memory = generator_memory(plan.config, plan.shape).get("rollout") or beside(plan.config, plan.shape, "awake", 0)
    weights = memory["vLLM weights"]
    for number in re.findall(r"(\d+) GiB of weights per GPU", path.read_text()):
        assert int(number) == round(weights / GIB)


def test_a_plan_is_made_and_printed_without_torch() -> None:
    """Errors of a user come at once: all that the command imports before it starts ranks."""
    modules = ["planning.plan", "rehearsal.run", "rehearsal.findings", "rehearsal.show"]
    use = f"import sys, {', '.join(f'megatron_aspo.tools.{name}' for name in modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_makes_several_updates_per_step(path: Path) -> None:
    plan = make_plan(load_config(path))
    assert plan.config.updates_per_step >= 4


def test_settings_that_lower_the_memory() -> None:
    config = recipe("qwen2_5_32b", "train.recompute=none", "train.release_gradients=false", "rollout.sleep_level=1")
    offload, wider = "optimizer.cpu_offload=1", "a higher parallel.tensor or pipeline"
    assert remedies(config, "update", "asleep") == [
        "rollout.sleep_level=2",
        "a lower train.max_tokens_per_micro_batch",
        "train.recompute=full",
        offload,
        wider,
    ]
    released = "train.release_gradients=true"
    assert remedies(config, "rollout", "awake") == [
        *(released, "a lower rollout.kv_cache_gb", "a higher rollout.tensor", offload, wider)
    ]
    assert remedies(config, "refit", "refit")[:2] == [released, "rollout.sleep_level=2"]
    embedded = recipe("qwen2_5_32b", "rollout.engine=megatron", "rollout.tensor=1", "rollout.request_seeds=true")
    assert remedies(embedded, "rollout", "awake") == ["a lower rollout.batch_size", offload, wider]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("qwen2_5_32b", ["parallel.tensor=3"], "parallel.tensor=3"),
        ("llama3_3_70b", ["parallel.tensor=16"], "parallel.tensor=16"),
        ("qwen3_235b_a22b", ["--gpus", "120"], "x pipeline=8"),
        ("qwen2_5_32b", ["--gpus", "28"], "multiple of 8"),
        ("qwen2_5_32b", ["parallel.pipeline=3"], "parallel.pipeline=3"),
        ("qwen3_32b", ["parallel.first_stage_layers=14"], "first_stage_layers=14"),
        ("qwen3_30b_a3b", ["parallel.expert=12"], "parallel.expert=12"),
        ("qwen3_30b_a3b", ["parallel.sequence_parallel=false"], "sequence"),
        ("qwen2_5_32b", ["parallel.expert=2"], "experts"),
        ("qwen2_5_32b", ["rollout.tensor=16"], "rollout.tensor=16"),
        ("qwen3_32b", ["rollout.tensor=64"], "rollout.tensor=64"),
        ("qwen2_5_32b", ["rollout.kv_cache_gb=0.3"], "rollout.kv_cache_gb=0.3"),
        (
            "qwen2_5_32b",
            ["model.max_sequence_length=40000", "train.max_tokens_per_micro_batch=40960"],
            "32768",
        ),
        ("qwen2_5_32b", ["train.max_tokens_per_micro_batch=8192"], "10240"),
        ("qwen2_5_72b", ["train.mini_batch_prompts=1", "rollout.responses_per_prompt=2"], "train.mini_batch_prompts=1"),
        ("qwen2_5_72b", ["model.hf_path=Qwen/Qwen9"], "model.hf_path=Qwen/Qwen9"),
        ("deepseek_v3_671b", ["parallel.context=2", "train.max_tokens_per_micro_batch=8192"], "latent attention"),
        ("deepseek_v3_671b", ["rollout.engine=megatron"], "tensor=32"),
        ("qwen2_5_32b", ["cluster.gpu=h300"], "cluster.gpu='h300' "),
        ("qwen2_5_72b", ["fp8.recipe=blockwise"], "128"),
        ("qwen2_5_32b", ["fp8.recipe=delayed", "fp8.bf16_layers_at_end=1"], "bf16"),
        (
            "qwen2_5_32b",
            ["fp8.recipe=mxfp8"],
            "9.0",
        ),
        ("qwen2_5_32b", ["cluster.gpu=a100", "fp8.recipe=current"], "8.0"),
        ("qwen2_5_32b", ["train.router_replay=trainer"], "experts"),
        ("qwen3_32b", ["parallel.context=3"], "10248"),
        ("qwen2_5_32b", ["train.mini_batch_prompts=128"], "rollout.prompts_per_step=64"),
        ("qwen2_5_32b", ["--gpus", "0"], "--gpus=0"),
        ("qwen2_5_32b", ["--gpu", "h300"], "--gpu"),
        ("demo_chain_sum", ["--quick"], "model.dtype=bfloat16"),
        ("qwen2_5_32b", ["--build"], "always rehearses"),
        ("qwen2_5_32b", ["--rehearse"], "--quick"),
    ],
)
def test_a_planted_error_is_one_line(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(EXAMPLES / f"{name}.yaml"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-aspo: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_run_without_a_cluster_is_planned_on_the_fewest_gpus() -> None:
    assert make_plan(load_config(EXAMPLES / "demo_chain_sum.yaml")).world == 2


def test_a_folder_goes_before_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen3-32B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLIC["Qwen/Qwen3-32B"] | {"num_hidden_layers": 3}))
    assert shape_of(ModelConfig(hf_path="Qwen/Qwen3-32B"), 0).num_layers == 3
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        shape_of(ModelConfig(hf_path="Qwen/Qwen3-32B"), 0)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is a gpt2 model"):
        shape_of(ModelConfig(hf_path="Qwen/Qwen3-32B"), 0)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="lacks 'num_hidden_layers'"):
        shape_of(ModelConfig(hf_path="Qwen/Qwen3-32B"), 0)


def test_delta_nets_follow_the_list_of_layers() -> None:
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    usual = shape(name)
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(48)]
    assert shape_of_hf(PUBLIC[name] | {"layer_types": kinds}, name) == usual
    kinds[0], kinds[3] = kinds[3], kinds[0]
    moved = shape_of_hf(PUBLIC[name] | {"layer_types": kinds}, name)
    assert [moved.has_attention(i) for i in range(4)] == [True, False, False, False]
    assert engine_parameters(moved, 1) == engine_parameters(usual, 1)
    none = shape_of_hf(PUBLIC[name] | {"layer_types": ["linear_attention"] * 48}, name)
    assert (none.attention_layers(), kv_bytes_per_token(none, 1)) == (0, 0)
    for wrong, found in ((kinds[:3], "3 of full_attention, linear_attention"), (["mamba"] * 48, "48 of mamba")):
        with pytest.raises(UserError, match=f"for each of its 48 layers; it has {found}$"):
            shape_of_hf(PUBLIC[name] | {"layer_types": wrong}, "folder")


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (None, True), (None, None)])
def test_a_text_model_is_tied_by_the_outer_field(outer: bool | None, inner: bool | None) -> None:
    """As in transformers, whose whole model reads its own configuration alone."""
    text = PUBLIC["Qwen/Qwen3-32B"] | {"tie_word_embeddings": inner}
    del text["model_type"]  # the outer one determines it
    config = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": outer}
    config = {name: value for name, value in config.items() if value is not None}
    found = shape_of_hf(text_settings(config), "folder")
    assert (found.tied, found.num_layers) == (bool(outer), 64)


@pytest.mark.parametrize("fields", [{}, {"text_config": {}}, {"model_type": "qwen3_5", "text_config": None}])
def test_a_configuration_without_a_model_is_one_line(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "run.yaml").write_text(f"name: t\nmodel: {{hf_path: {tmp_path}}}\n")
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--quick", "--gpus", "1"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"is a {fields.get('model_type')} model; llama," in err
