"""All kinds of ranks of every recipe against the files of the model and the rules of a checkpoint; planted errors."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from safetensors.torch import load_file, save_file
from tiny_models import change_published, write_published

from megatron_aspo.config.load import load_config
from megatron_aspo.errors import UserError
from megatron_aspo.tools.planning.architectures import local_config
from megatron_aspo.tools.planning.layout import training_ranks
from megatron_aspo.tools.planning.plan import Plan, make_plan
from megatron_aspo.tools.rehearsal.run import Parts, check_parts

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

EXAMPLES = Path(__file__).parents[2] / "examples"

# recipe -> (kinds of ranks, tensors of the files)
RECIPES = {
    "archer2_math": (1, 339),
    "qwen2_5_32b": (8, 771),
    "qwen3_32b": (16, 707),
    "qwen2_5_72b": (16, 963),
    "llama3_3_70b": (16, 723),
    "qwen3_30b_a3b": (8, 18867),
    "qwen3_235b_a22b": (128, 36945),
    "qwen3_235b_a22b_h200": (64, 36945),
    "qwen3_235b_a22b_async": (128, 36945),  # virtual stages
    "deepseek_v3_671b": (256, 45395),
    "glm4_5_air": (32, 17925),
    "qwen3_next_80b_a3b": (32, 74391),
}


SAME_RANKS = {"qwen3_32b_async": "qwen3_32b", "archer2_code": "archer2_math"}
"""Recipe -> another one with the same training ranks."""


def build(plan: Plan) -> Parts:
    """As `check_parts`, in this process."""
    from megatron_aspo.tools.rehearsal.files import build_kinds

    with local_config(plan.config) as config:
        return build_kinds(config, training_ranks(config, plan.world), plan.shape.vocab_size)


def build_all(names: list[str]) -> dict[str, tuple[Parts, float]]:
    """Build recipes in one process, which imports the bridge once; also return the CPU seconds of each."""
    built: dict[str, tuple[Parts, float]] = {}
    for name in names:
        start = time.process_time()
        parts = build(make_plan(load_config(EXAMPLES / f"{name}.yaml")))
        built[name] = parts, time.process_time() - start
    return built


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Parts, float]]:
    return run(1, build_all, list(RECIPES), timeout=1500)[0]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_built_at_full_size(name: str, built: dict[str, tuple[Parts, float]]) -> None:
    parts, seconds = built[name]
    assert (parts.kinds, parts.tensors, parts.findings) == (*RECIPES[name], [])
    assert parts.checkpoint_tensors >= 13
    assert seconds < 120  # 35 on an idle core for the largest


def test_every_recipe_is_built() -> None:
    shipped = {path.stem for path in EXAMPLES.glob("*.yaml") if "cluster:" in path.read_text()}
    assert shipped == {*RECIPES, *SAME_RANKS}
    for names in SAME_RANKS.items():
        one, other = (load_config(EXAMPLES / f"{name}.yaml") for name in names)
        assert (one.model, one.parallel) == (other.model, other.parallel)


def complaints(cases: list[tuple[str, int]]) -> list[str]:
    """The findings in each configuration, or its error."""
    messages: list[str] = []
    for path, gpus in cases:
        try:
            parts = build(make_plan(load_config(path), gpus))
            messages.append("; ".join(parts.findings) or f"{parts.kinds} kinds, {parts.tensors} tensors")
        except UserError as error:
            messages.append(str(error))
    return messages


def changed_copy(source: Path, folder: Path, drop: str = "", add: str = "", **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    tensors = load_file(source / "model.safetensors")
    if drop:
        del tensors[drop]
    save_file(tensors | ({add: torch.zeros(3)} if add else {}), folder / "model.safetensors", {"format": "pt"})
    return folder


def run_file(folder: Path, model: Path, *lines: str) -> str:
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    text = f"name: t\nmodel: {{hf_path: {model}, max_sequence_length: 64}}\nrollout: {{max_response_tokens: 32}}\n"
    path.write_text(text + "\n".join(lines))
    return str(path)


def test_what_is_planted_wrong_is_found(tiny: Path, tmp_path: Path) -> None:
    last = "model.layers.1.mlp.up_proj.weight"
    lost = "model.layers.1.mlp.experts.3.down_proj.weight"
    published, scale = write_published(tmp_path / "fp8", tmp_path / "meant"), f"{lost}_scale_inv"
    pp2, ep2 = "parallel: {pipeline: 2}", "parallel: {expert: 2, tensor: 2, expert_tensor: 1, sequence_parallel: true}"
    vllm = "rollout: {engine: vllm, max_response_tokens: 32}"
    tp2 = "parallel: {tensor: 2}"

    def case(model: Path, *lines: str) -> str:
        text = [line for line in lines if line]
        path = run_file(tmp_path, model, *text)
        if vllm in text:  # each section once
            Path(path).write_text(Path(path).read_text().replace("rollout: {max_response_tokens: 32}\n", "", 1))
        return path

    found = {
        "2 kinds, 21 tensors": (case(tiny / "llama", tp2), 2),
        "2 kinds, 45 tensors": (case(tiny / "qwen3-moe", ep2, vllm), 4),
        f"lack the tensor(s) {last}": (case(changed_copy(tiny / "llama", tmp_path / "a", drop=last), pp2), 2),
        f"lack the tensor(s) {lost}": (
            case(changed_copy(tiny / "qwen3-moe", tmp_path / "b", drop=lost), ep2, vllm),
            4,
        ),
        "have the tensor(s) model.layers.7.odd": (
            case(changed_copy(tiny / "llama", tmp_path / "c", add="model.layers.7.odd"), pp2),
            2,
        ),
        "have 9 tensors, among them": (case(changed_copy(tiny / "llama", tmp_path / "d", num_hidden_layers=1)), 1),
        "`num_hidden_layers` (1) must be equal to": (
            case(changed_copy(tiny / "qwen3", tmp_path / "m", num_hidden_layers=1)),
            1,
        ),
        "lack 9 tensors, among them": (case(changed_copy(tiny / "llama", tmp_path / "e", num_hidden_layers=3)), 1),
        "mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight of the model's files have 3072 numbers": (
            case(changed_copy(tiny / "llama", tmp_path / "f", intermediate_size=56)),
            1,
        ),
        "model.embed_tokens.weight of the model's files have 4192 numbers": (
            case(changed_copy(tiny / "llama", tmp_path / "g", vocab_size=140)),
            1,
        ),
        "lack 6 tensors, among them": (
            case(changed_copy(tiny / "llama", tmp_path / "h", architectures=["Qwen2ForCausalLM"], model_type="qwen2")),
            1,
        ),
        "hidden_act=gelu": (case(changed_copy(tiny / "llama", tmp_path / "i", hidden_act="gelu")), 1),
        "rope_type=yarn": (
            case(
                changed_copy(
                    tiny / "llama",
                    tmp_path / "j",
                    rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
                )
            ),
            1,
        ),
        "such groups of experts": (
            case(changed_copy(tiny / "deepseek-v3", tmp_path / "k", num_experts_per_tok=2), vllm),
            1,
        ),
        "2 kinds, 53 tensors": (case(published, "parallel: {expert: 2}", vllm), 2),
        "4 kinds, 53 tensors": (
            case(tiny / "deepseek-v3", "parallel: {tensor: 2, pipeline: 2, sequence_parallel: true}", vllm),
            4,
        ),
        f"lacks the tensor(s) {scale}, the scales": (
            case(change_published(published, tmp_path / "l", **{scale: None}), vllm),
            1,
        ),
        "quant_method=awq, weight_block_size=None; only fp8": (
            case(change_published(published, tmp_path / "n", {"quantization_config": {"quant_method": "awq"}}), vllm),
            1,
        ),
    }
    messages = run(1, complaints, list(found.values()))[0]
    for message, text in zip(messages, found, strict=True):
        assert text in message
        assert "\n" not in message


def megatron_refuses(path: str) -> str:
    """The error of a layout that Megatron rejects after the plan's own checks pass."""
    plan = make_plan(load_config(path))
    parallel = replace(plan.config.parallel, pipeline=8, first_stage_layers=None, last_stage_layers=None)
    with pytest.raises(UserError) as error:
        build(replace(plan, config=replace(plan.config, parallel=parallel), world=36))
    return str(error.value)


def test_megatron_has_its_word() -> None:
    (message,) = run(1, megatron_refuses, str(EXAMPLES / "qwen3_32b.yaml"))
    assert "Megatron-Core refuses the layout: world_size (36) is not divisible by" in message


def test_the_check_has_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    path = run_file(tmp_path, changed_copy(tiny / "llama", tmp_path / "a", drop=lost), "parallel: {pipeline: 2}")
    parts = check_parts(make_plan(load_config(path), 2))
    assert (parts.kinds, parts.findings) == (
        2,
        [f"the model's files lack the tensor(s) {lost}, which config.json calls for"],
    )
    refused = run_file(tmp_path, changed_copy(tiny / "llama", tmp_path / "b", hidden_act="gelu"))
    with pytest.raises(UserError, match="hidden_act=gelu"):
        check_parts(make_plan(load_config(refused), 1))
