"""The full-size dry run: every recipe is built, and what is planted wrong is found in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from safetensors.torch import load_file, save_file
from tiny_models import change_published, write_published

from megatron_aspo.config_file import load_config
from megatron_aspo.errors import UserError
from megatron_aspo.planning.architectures import PUBLIC
from megatron_aspo.planning.plan import make_plan

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

EXAMPLES = Path(__file__).parents[2] / "examples"

# recipe -> (kinds of ranks, billions of parameters, tensors of the files)
RECIPES = {
    "archer2_math": (1, 1.777, 339),
    "archer2_code": (1, 1.777, 339),
    "qwen2_5_32b": (8, 32.764, 771),
    "qwen3_32b": (16, 32.762, 707),
    "qwen2_5_72b": (16, 72.706, 963),
    "llama3_3_70b": (16, 70.554, 723),
    "qwen3_30b_a3b": (8, 30.532, 18867),
    "qwen3_235b_a22b": (128, 235.094, 36945),
    "qwen3_235b_a22b_h200": (64, 235.094, 36945),
    "deepseek_v3_671b": (256, 671.026, 45395),
}


def build_all(names: list[str]) -> dict[str, Any]:
    """In one process, which imports the bridge once; and the seconds of a core that it took."""
    from megatron_aspo.planning.build import build_plan

    start = time.process_time()
    built = {name: build_plan(make_plan(load_config(EXAMPLES / f"{name}.yaml"))) for name in names}
    return built | {"seconds": time.process_time() - start}


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return run(1, build_all, list(RECIPES), timeout=1500)[0]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_built_at_full_size(name: str, built: dict[str, Any]) -> None:
    ranks, billions, tensors = RECIPES[name]
    assert built[name].ranks == ranks
    assert built[name].parameters / 1e9 == pytest.approx(billions, abs=5e-4)
    assert built[name].tensors == tensors
    assert built[name].checkpoint_tensors >= 13


def test_all_of_them_take_less_than_five_minutes(built: dict[str, Any]) -> None:
    assert built["seconds"] < 300


def test_every_recipe_is_built() -> None:
    shipped = {path.stem for path in EXAMPLES.glob("*.yaml") if "cluster:" in path.read_text()}
    assert shipped == set(RECIPES)


def complaints(cases: list[tuple[str, int]]) -> list[str]:
    """What building each configuration is refused with."""
    from megatron_aspo.planning.build import build_plan

    messages: list[str] = []
    for path, gpus in cases:
        try:
            messages.append(str(build_plan(make_plan(load_config(path), gpus))))
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
        if vllm in text:  # a section once only
            Path(path).write_text(Path(path).read_text().replace("rollout: {max_response_tokens: 32}\n", "", 1))
        return path

    found = {
        "built 2 kinds of ranks": (case(tiny / "llama", tp2), 2),
        "45 tensors of its files each consumed once": (case(tiny / "qwen3-moe", ep2, vllm), 4),
        f"lacks the tensor(s) {last}": (case(changed_copy(tiny / "llama", tmp_path / "a", drop=last), pp2), 2),
        f"lacks the tensor(s) {lost}": (
            case(changed_copy(tiny / "qwen3-moe", tmp_path / "b", drop=lost), ep2, vllm),
            4,
        ),
        "has the tensor(s) model.layers.7.odd": (
            case(changed_copy(tiny / "llama", tmp_path / "c", add="model.layers.7.odd"), pp2),
            2,
        ),
        "has 9 tensors, among them": (case(changed_copy(tiny / "llama", tmp_path / "d", num_hidden_layers=1)), 1),
        "`num_hidden_layers` (1) must be equal to": (
            case(changed_copy(tiny / "qwen3", tmp_path / "m", num_hidden_layers=1)),
            1,
        ),
        "lacks 9 tensors, among them": (case(changed_copy(tiny / "llama", tmp_path / "e", num_hidden_layers=3)), 1),
        "mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight have 3072 numbers": (
            case(changed_copy(tiny / "llama", tmp_path / "f", intermediate_size=56)),
            1,
        ),
        "model.embed_tokens.weight have 4192 numbers": (
            case(changed_copy(tiny / "llama", tmp_path / "g", vocab_size=140)),
            1,
        ),
        "lacks 6 tensors, among them": (
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
        "53 tensors of its files each consumed once": (case(published, "parallel: {expert: 2, pipeline: 2}", vllm), 4),
        "built 4 kinds of ranks": (
            case(tiny / "deepseek-v3", "parallel: {tensor: 2, pipeline: 2, sequence_parallel: true}", vllm),
            4,
        ),
        f"lacks the tensor(s) {scale}, without which": (
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


def megatron_refuses(path: str) -> list[str]:
    """What Megatron finds wrong after the plan's own checks have been passed, and a plan that miscounts."""
    from dataclasses import replace

    from megatron_aspo.planning.build import build_plan

    plan = make_plan(load_config(path))
    too_many = replace(plan.config.parallel, pipeline=8, first_stage_layers=None, last_stage_layers=None)
    miscounted = replace(plan.shape, qkv_bias=not plan.shape.qkv_bias)
    messages: list[str] = []
    for changed in (
        replace(plan, config=replace(plan.config, parallel=too_many), world=36),
        replace(plan, shape=miscounted),
    ):
        try:
            messages.append(str(build_plan(changed)))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_megatron_has_its_word() -> None:
    ((world, count),) = run(1, megatron_refuses, str(EXAMPLES / "qwen3_32b.yaml"))
    assert "Megatron-Core refuses the layout: world_size (36) is not divisible by" in world
    assert "parameters a rank, and" in count


def test_the_shapes_are_those_of_transformers_own_models() -> None:
    assert run(1, file_totals)[0] == {
        name: pytest.approx(total, abs=0.006) for name, total in
        (("Qwen/Qwen3-32B", 32.76), ("Qwen/Qwen3-30B-A3B", 30.53), ("meta-llama/Llama-3.3-70B-Instruct", 70.55))
    }  # fmt: skip


def file_totals() -> dict[str, float]:
    """Billions of numbers in the tensors that transformers would write."""
    import math

    from transformers import AutoConfig

    from megatron_aspo.policy import hf

    names = ("Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.3-70B-Instruct")
    found: dict[str, float] = {}
    for name in names:
        fields = {key: value for key, value in PUBLIC[name].items() if key != "model_type"}
        config = AutoConfig.for_model(PUBLIC[name]["model_type"], **fields)
        found[name] = sum(math.prod(shape) for shape in hf._expected_shapes(config).values()) / 1e9
    return found
