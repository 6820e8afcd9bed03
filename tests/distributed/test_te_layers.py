"""Transformer Engine's own layers in training: the program of a GPU, on kernels in torch operations.

Updates in float32 equal those of Megatron-Core's local layers on one rank, at every layout, so they are held to the
same bounds as `test_layouts`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import te_ranks
from ranks import open_policy, run, run_config, write_weights
from te_ranks import needs_te
from test_layouts import check_updates, take_updates
from test_resume import learn, learning_config
from test_router_replay import REPLAY, moved, routes_of_a_step, step_config

from megatron_aspo.config.model import ModelConfig, ParallelConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.policy import checkpoint
from megatron_aspo.policy.architecture import Architecture

pytestmark = [pytest.mark.distributed, pytest.mark.slow, needs_te]

DENSE = run_config().model
EXPERTS = replace(DENSE, num_experts=4, moe_ffn_hidden_size=32, moe_aux_loss_coef=0.0)
LATENT = {
    "num_query_groups": DENSE.num_attention_heads,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "qk_layernorm": True,
    "rope_type": "rope",
    "moe_shared_expert_intermediate_size": 32,
}
MODELS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "normed queries": (DENSE, {"qk_layernorm": True}),
    "experts": (EXPERTS, {}),
    "balanced experts": (replace(EXPERTS, moe_aux_loss_coef=0.01, moe_z_loss_coef=0.01), {}),
    "latent": (EXPERTS, LATENT),
}
"""Name -> (its section of the configuration, settings of Megatron's that only Hugging Face models have)."""

LOSSES = ["aspo", "gspo"]
ONE_STREAM = TrainConfig(max_tokens_per_micro_batch=1024)
STREAMS = TrainConfig(max_tokens_per_micro_batch=100)
FULL = replace(STREAMS, recompute="full")


def selective(*modules: Any) -> TrainConfig:
    return replace(STREAMS, recompute="selective", recompute_modules=modules)


TP2 = ParallelConfig(tensor=2, sequence_parallel=True)
TP2_EP2 = replace(TP2, expert=2, expert_tensor=1)
CASES: dict[str, tuple[str, ParallelConfig, TrainConfig]] = {
    "dense": ("dense", ParallelConfig(), STREAMS),
    "dense, tp2-sp, recomputed": ("dense", TP2, FULL),
    "dense, cp2": ("dense", ParallelConfig(context=2), STREAMS),
    "dense, pp2, partly recomputed": ("dense", ParallelConfig(pipeline=2), selective("layernorm", "mlp")),
    "normed queries, tp2-sp": ("normed queries", TP2, STREAMS),
    "normed queries, cp2, recomputed": ("normed queries", ParallelConfig(context=2), FULL),
    "experts": ("experts", ParallelConfig(), STREAMS),
    "experts, ep2, partly recomputed": ("experts", ParallelConfig(expert=2), selective("layernorm", "moe")),
    "experts, tp2-ep2-sp, recomputed": ("experts", TP2_EP2, FULL),
    "balanced experts": ("balanced experts", ParallelConfig(), ONE_STREAM),  # balance is that of a micro-batch
    "latent": ("latent", ParallelConfig(), STREAMS),
    "latent, ep2, partly recomputed": ("latent", ParallelConfig(expert=2), selective("mla_up_proj", "layernorm")),
    "latent, pp2, recomputed": ("latent", ParallelConfig(pipeline=2), FULL),
}


def build_with(settings: dict[str, Any]) -> None:
    """Let the project build models with these settings of Megatron's."""
    from_config = Architecture.from_config

    def changed(config: ModelConfig) -> Architecture:
        architecture = from_config(config)
        return replace(architecture, transformer=architecture.transformer | settings)

    Architecture.from_config = staticmethod(changed)  # type: ignore[method-assign]


def exact_layers() -> None:
    """Let the project build Transformer Engine's layers in float32, which it refuses: cuDNN has no such attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from te_reference.attention import allow_float32

    from megatron_aspo.policy import model

    allow_float32()
    model.block_spec = lambda config, stage: get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, vp_stage=stage
    )


def write_local_weights(folder: Path, name: str) -> None:
    model, settings = MODELS[name]
    build_with(settings)
    write_weights(folder, model)


def take_local_updates(folder: Path, name: str) -> dict[Any, Any]:
    model, settings = MODELS[name]
    build_with(settings)
    return take_updates(folder, model, ParallelConfig(), {"one stream": (ONE_STREAM, LOSSES)})


def take_exact_updates(folder: Path, name: str, parallel: ParallelConfig, train: TrainConfig) -> dict[Any, Any]:
    model, settings = MODELS[name]
    build_with(settings)
    exact_layers()
    config = run_config(parallel, model=model, train=train)
    return take_updates(folder, model, parallel, {"": (train, LOSSES)}, config=config)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the weights of a model, written by local layers on one rank."""

    @functools.cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp("weights")
        run(1, write_local_weights, folder, name)
        return folder

    return write


@pytest.fixture(scope="module")
def reference(weights: Callable[[str], Path]) -> Callable[[str], dict[Any, Any]]:
    """Updates of a model by local layers on one rank."""
    return functools.cache(lambda name: run(1, take_local_updates, weights(name), name)[0])


@pytest.mark.parametrize("case", CASES)
def test_an_update_equals_that_of_local_layers(
    case: str, weights: Callable[[str], Path], reference: Callable[[str], dict[Any, Any]]
) -> None:
    """Old, reference and current log-probs, gradients, the update and its metrics."""
    name, parallel, train = CASES[case]
    updates = te_ranks.run(parallel.model_parallel_size, take_exact_updates, weights(name), name, parallel, train)
    check_updates(updates, reference(name), 1e-5 if MODELS[name][0] is DENSE else 2e-5)


# --- Router replay, Hugging Face weights ---


def exact_routes(config: RunConfig) -> dict[str, Any]:
    exact_layers()
    return routes_of_a_step(config)


@pytest.mark.parametrize("train", [REPLAY, replace(REPLAY, recompute="full")], ids=["", "recomputed"])
def test_updates_take_the_old_experts(train: TrainConfig) -> None:
    """Grouped experts and fused permutation, at two expert-parallel ranks."""
    for found in te_ranks.run(2, exact_routes, step_config(ParallelConfig(expert=2), train)):
        assert found["metrics"]["log_ratio_max_first"] == 0
        assert found["metrics"]["log_ratio_max"] > 0.1
        for name, old in (("first", "first"), ("second", "second"), ("first, again", "first")):
            routes = found[f"{name}: with gradients"]
            if train.recompute == "full":  # the last layer first
                layers = EXPERTS.num_layers
                routes = [r for i in range(0, len(routes), layers) for r in routes[i : i + layers][::-1]]
            found["in order"] = routes
            assert moved(found, "in order", old) == 0
        assert moved(found, "second: again", "second") == 0
        assert moved(found, "second: free", "second") > 0


def exact_there_and_back(folders: list[Path], parallel: ParallelConfig) -> Any:
    from test_weights import there_and_back

    exact_layers()
    return there_and_back(folders, parallel)


def test_hugging_face_weights_there_and_back(tmp_path: Path) -> None:
    """Loaded and exported to the byte, as a refit does, with transformers' log-probs between: experts in the layout of
    grouped products, norms within linear layers, latent attention."""
    from tiny_models import write_model

    folders = [write_model(name, tmp_path / name) for name in ("qwen3", "qwen3-moe", "deepseek-v3")]
    for part, parallel in ((folders[:1], TP2), (folders[1:], TP2_EP2)):
        for results in te_ranks.run(2, exact_there_and_back, part, parallel):
            assert [changed for changed, _ in results] == [[] for _ in part]
            assert max(error for _, error in results) < 1e-4, results


# --- Checkpoints of the other layers ---


def learn_from(weights: Path, root: Path, name: str, engine: bool, resumes: bool) -> list[dict[str, float]]:
    """Metrics of three updates after a checkpoint of two, and norms of all weights; it is written here, or read."""
    model, settings = MODELS[name]
    build_with(settings)
    if engine:
        exact_layers()
    with open_policy(replace(learning_config(ParallelConfig()), model=model), weights / "reference") as policy:
        policy.keep_reference()
        if resumes:
            checkpoint.load(root / "step_000002", policy)
        else:
            learn(policy, range(2))
            checkpoint.save(root, 2, policy, {})
        return learn(policy, range(2, 5))


@pytest.mark.parametrize("name", ["normed queries", "latent"])
@pytest.mark.parametrize("is_written_by_engine", [False, True], ids=["read", "written"])
def test_checkpoints_go_between_the_kinds_of_layers(
    name: str, is_written_by_engine: bool, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    """A run continues on another machine with a GPU, or without one, moments and steps of Adam included."""
    starts, goes_on = (te_ranks.run, run) if is_written_by_engine else (run, te_ranks.run)
    arguments = (1, learn_from, weights(name), tmp_path, name)
    (expected,) = starts(*arguments, is_written_by_engine, False)
    (found,) = goes_on(*arguments, not is_written_by_engine, True)
    for update, wanted in zip(found, expected, strict=True):
        assert update == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_permutation_equals_the_triton_kernels() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "te_reference.check_permutation"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(te_ranks.ROOT / "tests")}
    folder = str(te_ranks.PYTHON / "transformer_engine")
    done = subprocess.run([*command, folder], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
