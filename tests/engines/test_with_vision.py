"""Text models of folders that were published with a vision encoder: trained, and exported in the published form."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_samples, run
from safetensors.torch import load_file, save_file
from test_weights import EXPERT_LAYOUTS, LAYOUTS, UPDATE, config_of, policy_of, refusals, update
from tiny_models import VOCAB, change_published, write_with_vision
from torch import Tensor

from megatron_aspo.batch import MicroBatch
from megatron_aspo.commands import export
from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.data.tokenizer import HuggingFaceTokenizer
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.hf.folder import copy_configuration
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.train import set_logprobs

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

MODELS = ("qwen3.5", "qwen3.5-moe", "qwen3.6-moe")
KEPT = ("model.visual.", "mtp.")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for name in MODELS:
        write_with_vision(name, folder / name)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def different(found: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    """Names on one side only, or of tensors that differ in a bit or in their type."""
    same = {x for x in found.keys() & expected if found[x].dtype == expected[x].dtype}
    return (found.keys() | expected.keys()) - {x for x in same if torch.equal(found[x], expected[x])}


@torch.no_grad()
def error_to_transformers(folder: Path, batches: list[MicroBatch]) -> float:
    """max |log-prob − by transformers' whole model, given text| over the responses of packed streams."""
    from transformers import AutoModelForImageTextToText

    settings: Any = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, **settings)
    model, loading = loaded
    assert not any(loading.values())
    worst = 0.0
    for batch in batches:
        assert batch.old_logprobs is not None
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            if (mask := batch.loss_mask[start:end].bool()).any():
                logits = model(batch.tokens[None, start:end]).logits[0].float()
                expected = logits.log_softmax(-1).gather(1, batch.labels[start:end, None])[:, 0]
                worst = max(worst, float((expected - batch.old_logprobs[start:end])[mask].abs().max()))
    return worst


def export_folder(folder: Path, exported: Path, parallel: ParallelConfig, dtype: str, updates: int) -> float:
    """Export the model after some updates; the error of the log-probs before them, in float32."""
    from megatron_aspo.policy.hf.weights import save_folder

    config = replace(config_of(folder, parallel, dtype=dtype), optimizer=UPDATE)
    with distributed(config), policy_of(config) as policy:
        batches = policy.pack(make_samples())
        set_logprobs(policy, [batches])
        is_compared = policy.is_last_stage and dtype == "float32" and not updates
        error = error_to_transformers(folder, batches) if is_compared else 0.0
        for _ in range(updates):
            update(policy)
        save_folder(exported, policy.config.model, policy.whole_chunks(), policy.vocab_size)
        return error


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in MODELS[:2] for layout in ("tp1", "tp2-sp", "pp2")]
    + [("qwen3.5-moe", layout) for layout in ("ep2-tp2-etp1", "ep2-pp2")]
    + [("qwen3.6-moe", "ep2-pp2")],
)
def test_there_and_back(name: str, layout: str, published: Path, tmp_path: Path) -> None:
    parallel, exported = (LAYOUTS | EXPERT_LAYOUTS)[layout], tmp_path / "exported"
    world = max(parallel.model_parallel_size, parallel.expert)
    errors = run(world, export_folder, published / name, exported, parallel, "float32", 0)
    assert max(errors) < 2e-5
    assert different(tensors_of(exported), tensors_of(published / name)) == set()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (published / name, exported))
    assert after == before | {"dtype": "float32", "text_config": before["text_config"] | {"dtype": "float32"}}
    assert HuggingFaceTokenizer(str(exported)).vocab_size == VOCAB


def test_the_outer_field_ties_the_embeddings(published: Path, tmp_path: Path) -> None:
    source, exported = tmp_path / "source", tmp_path / "exported"
    text = json.loads((published / "qwen3.5" / "config.json").read_text())["text_config"]
    change_published(published / "qwen3.5", source, {"text_config": text | {"tie_word_embeddings": True}})
    (error,) = run(1, export_folder, source, exported, ParallelConfig(), "float32", 0)
    assert error < 2e-5
    assert different(tensors_of(exported), tensors_of(source)) == set()


def test_an_update_changes_all_text_weights_and_nothing_else(published: Path, tmp_path: Path) -> None:
    folder, exported = published / "qwen3.5-moe", tmp_path / "exported"
    run(2, export_folder, folder, exported, ParallelConfig(expert=2), "float32", 2)
    before, after = tensors_of(folder), tensors_of(exported)
    text = {name for name in before if not name.startswith(KEPT)}
    assert before.keys() == after.keys()
    assert (
        different({name: after[name] for name in after.keys() - text}, {x: before[x] for x in before.keys() - text})
        == set()
    )
    assert {name for name in text if torch.equal(after[name], before[name])} == set()


def test_in_bfloat16_only_the_text_model_is_rounded(published: Path, tmp_path: Path) -> None:
    folder = published / "qwen3.5-moe"
    expected = {name: x.bfloat16() for name, x in tensors_of(folder).items()}
    run(1, export_folder, folder, tmp_path / "exported", ParallelConfig(), "bfloat16", 0)
    assert different(tensors_of(tmp_path / "exported"), expected) == set()


def save_checkpoint(config: Any) -> None:
    with distributed(config), policy_of(config) as policy:
        checkpoint.save(config.run_dir / "checkpoints", 3, policy, {})


def run_export(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = export.main(arguments)
    return code, stdout.getvalue()


def test_the_command_names_what_it_passes_on(published: Path, tmp_path: Path) -> None:
    folder = published / "qwen3.5"
    run(1, save_checkpoint, replace(config_of(folder, ParallelConfig()), output_dir=str(tmp_path)))
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"name: test\noutput_dir: {tmp_path}\nmodel: {{hf_path: {folder}, max_sequence_length: 64}}\n")
    ((code, output),) = run(1, run_export, [str(yaml), str(tmp_path / "exported")])
    kept = [name for name in tensors_of(folder) if name.startswith("mtp.")]
    assert code == 0
    assert f"\n{len(kept)} tensors of MTP are those of model.hf_path={folder}: stale, not trained\n" in output
    assert f"\n21 tensors of vision are those of model.hf_path={folder}: untouched\n" in output


def test_other_tools_get_the_text_model(published: Path, tmp_path: Path) -> None:
    copy_configuration(ModelConfig(hf_path=str(published / "qwen3.5-moe")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert (config["model_type"], config["vocab_size"], config["dtype"]) == ("qwen3_5_moe_text", VOCAB, "float32")
    assert "vision_config" not in config


def test_what_does_not_fit_is_one_line(published: Path, tmp_path: Path) -> None:
    experts = "model.language_model.layers.1.mlp.experts.gate_up_proj"

    def other(name: str, change: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((published / "qwen3.5-moe" / "config.json").read_text())
        tensors = tensors_of(published / "qwen3.5-moe")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    norm = "model.language_model.norm.weight"
    cases = {
        "has model.norm.weight twice, in": other(
            "twice", lambda _, tensors: tensors.update({"model.norm.weight": tensors[norm].clone()})
        ),
        "lacks 16 tensors, among them model.layers.1.mlp.experts.0.gate_proj.weight": other(
            "few", lambda _, tensors: tensors.update({experts: tensors[experts][:7]})
        ),
        "experts.0.up_proj.weight has the shape (32, 32), its config.json says (24, 32)": other(
            "large", lambda _, tensors: tensors.update({experts: torch.zeros(8, 56, 32)})
        ),
        "lacks the tensor(s) model.norm.weight": other("less", lambda _, tensors: tensors.pop(norm)),
        "is a Qwen3_5MoeForSequenceClassification, which is not supported": other(
            "kind", lambda config, _: config.update(architectures=["Qwen3_5MoeForSequenceClassification"])
        ),
    }
    (messages,) = run(1, refusals, list(cases.values()), ParallelConfig(), {})
    for message, text in zip(messages, cases, strict=True):
        assert text in message
        assert "\n" not in message
