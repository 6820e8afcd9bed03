"""What a run's folder tells the next attempt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_aspo.config import CheckpointConfig, ClusterConfig, OptimizerConfig, RunConfig, to_dict
from megatron_aspo.config_data import DataConfig, SourceConfig
from megatron_aspo.run_folder import changed_settings
from megatron_aspo.run_log import save_provenance

BEFORE = RunConfig(
    name="first",
    data=DataConfig(task="chain_sum", seed=1),
    optimizer=OptimizerConfig(lr=1e-6, clip_grad=1.0),
    checkpoint=CheckpointConfig(resume="never"),
)


def attempt(run_dir: Path, config: RunConfig) -> Path:
    save_provenance(run_dir, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), [])
    return run_dir / "checkpoints" / "step_000025"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return attempt(tmp_path, BEFORE)


def test_a_run_that_goes_on_as_it_was(checkpoint: Path) -> None:
    resumed = replace(BEFORE, name="branch", output_dir="elsewhere", checkpoint=CheckpointConfig(resume="auto"))
    assert changed_settings(checkpoint, resumed) == []


def test_each_change_is_named_with_what_it_was(checkpoint: Path) -> None:
    changed = replace(
        BEFORE,
        data=DataConfig(path="own.jsonl", seed=2),
        optimizer=OptimizerConfig(lr=2e-6, clip_grad=0.5),
        checkpoint=CheckpointConfig(stop_signals=("SIGTERM",)),
    )
    assert changed_settings(checkpoint, changed) == [
        'data.task="" (was chain_sum)',
        'data.path=own.jsonl (was "")',
        "data.seed=2 (was 1)",
        "optimizer.lr=2e-06 (was 1e-06)",
        "optimizer.clip_grad=0.5 (was 1.0)",
        'checkpoint.stop_signals=["SIGTERM"] (was ["SIGUSR1", "SIGTERM"])',
    ]


def test_a_setting_that_an_older_version_did_not_know_is_no_change(checkpoint: Path) -> None:
    file = checkpoint.parent.parent / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("  lr: ")))
    changed = replace(BEFORE, optimizer=OptimizerConfig(lr=2e-6, clip_grad=0.5))
    assert changed_settings(checkpoint, changed) == ["optimizer.clip_grad=0.5 (was 1.0)"]


def test_mappings_and_lists_of_sections(tmp_path: Path) -> None:
    one, other = SourceConfig(task="chain_sum"), SourceConfig(path="a.jsonl", prompt_template="Sum:\n{prompt}")
    before = replace(BEFORE, data=DataConfig(sources=(one, other)))
    checkpoint = attempt(tmp_path, before)

    def changed(*sources: SourceConfig, **config: Any) -> list[str]:
        return changed_settings(checkpoint, replace(before, data=DataConfig(sources=sources), **config))

    assert changed(one, other) == []
    assert changed(replace(one, task_args={"min_terms": 3}), replace(other, prompt_template="Add:\n{prompt}")) == [
        'data.sources.0.task_args={"min_terms": 3} (was {})',
        'data.sources.1.prompt_template="Add:\\n{prompt}" (was "Sum:\\n{prompt}")',
    ]
    for damaged in ("[null, 3]", "2026-01-01"):
        file = checkpoint.parent.parent / "config.yaml"
        file.write_text(f"data: {{sources: {damaged}}}\n")
        (replaced,) = changed(one, other)
        assert replaced.startswith("data.sources=[")
    attempt(tmp_path, before)
    (fewer,) = changed(one)
    assert fewer.startswith('data.sources=[{"task": "chain_sum", "task_args": {}, ')
    assert fewer.count("...") == 2
    (cluster,) = changed(one, other, cluster=ClusterConfig(gpu="h200"))
    assert cluster.startswith("cluster={")
    assert cluster.endswith(" (was null)")


def test_a_checkpoint_that_was_copied_from_its_run(checkpoint: Path) -> None:
    (checkpoint.parent.parent / "copies").mkdir()
    copied = checkpoint.parent.parent / "copies" / "step_000025"
    assert changed_settings(copied, replace(BEFORE, optimizer=OptimizerConfig(lr=2e-6))) == []


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "\xff", "a: 2024-13-45"])
def test_a_damaged_file_keeps_nobody_from_resuming(text: str, checkpoint: Path) -> None:
    (checkpoint.parent.parent / "config.yaml").write_text(text, encoding="latin-1")
    assert changed_settings(checkpoint, BEFORE) == []
    (checkpoint.parent.parent / "config.yaml").unlink()
    assert changed_settings(checkpoint, BEFORE) == []
