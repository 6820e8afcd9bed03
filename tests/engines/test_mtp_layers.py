"""Layers for multi-token prediction pass through an export unchanged, in families that number them and in others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run
from safetensors.torch import load_file, save_file
from test_weights import UPDATE, config_of, policy_of, update
from test_with_vision import different, tensors_of
from tiny_models import write_model

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.ranks.process_group import distributed

pytestmark = [pytest.mark.engines, pytest.mark.distributed]

BY_NUMBER = ("glm4-moe", "glm4-moe-lite")
"""Families whose MTP layer has the number behind the last layer's; in the others its names begin with "mtp."."""


def write_with_mtp(name: str, folder: Path) -> Path:
    """Write a tiny model whose MTP layer is a copy of its last layer, with the tensors that join it to the model."""
    write_model(name, folder)
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    last, size = f"model.layers.{config['num_hidden_layers'] - 1}.", config["hidden_size"]
    mtp = f"model.layers.{config['num_hidden_layers']}." if name in BY_NUMBER else "mtp.layers.0."
    copied = {key.replace(last, mtp): tensor + 1 for key, tensor in stored.items() if key.startswith(last)}
    joins = mtp if name in BY_NUMBER else "mtp."
    copied[f"{joins}{'eh_proj' if name in BY_NUMBER else 'fc'}.weight"] = torch.ones(size, 2 * size)
    save_file(stored | copied, folder / "model.safetensors", {"format": "pt"})
    field = "num_nextn_predict_layers" if name in BY_NUMBER else "mtp_num_hidden_layers"
    (folder / "config.json").write_text(json.dumps(config | {field: 1}))
    return folder


def export_before_and_after_an_update(folder: Path, exported: Path) -> None:
    from megatron_aspo.policy.hf.weights import save_folder

    config = replace(config_of(folder, ParallelConfig(expert=2)), optimizer=UPDATE)
    with distributed(config), policy_of(config) as policy:
        save_folder(exported / "before", policy.config.model, policy.whole_chunks(), policy.vocab_size)
        update(policy)
        save_folder(exported / "after", policy.config.model, policy.whole_chunks(), policy.vocab_size)


@pytest.mark.parametrize("name", [*BY_NUMBER, "qwen3-next"])
def test_an_export_has_the_published_layer(name: str, tmp_path: Path) -> None:
    folder = write_with_mtp(name, tmp_path / "source")
    run(2, export_before_and_after_an_update, folder, tmp_path)
    published = tensors_of(folder)
    kept = {key for key in published if "mtp." in key or ".layers.2." in key}
    assert len(kept) > 10
    assert different(tensors_of(tmp_path / "before"), published) == set()
    fixed = {key for key in published if key.endswith("e_score_correction_bias")}
    assert different(tensors_of(tmp_path / "after"), published) == published.keys() - kept - fixed
