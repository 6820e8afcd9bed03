"""Checkpoints and settings in a run's folder, as seen by the next attempt."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_aspo.config.data import DataConfig, SourceConfig
from megatron_aspo.config.run import ClusterConfig, RunConfig
from megatron_aspo.config.training import CheckpointConfig, OptimizerConfig
from megatron_aspo.errors import UserError
from megatron_aspo.journal.folder import changed_settings, find_resume, list_checkpoints, remove_partial, step_of

BEFORE = RunConfig(
    name="first",
    data=DataConfig(task="chain_sum", seed=1),
    optimizer=OptimizerConfig(lr=1e-6, clip_grad=1.0),
    checkpoint=CheckpointConfig(resume="never"),
)


def attempt(run_dir: Path, config: RunConfig) -> Path:
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    return run_dir / "checkpoints" / "step_000025"


def test_each_change_is_named_with_what_it_was(tmp_path: Path) -> None:
    checkpoint = attempt(tmp_path, BEFORE)
    resumed = replace(BEFORE, name="branch", output_dir="elsewhere", checkpoint=CheckpointConfig(resume="auto"))
    assert changed_settings(checkpoint, resumed) == []
    changed = replace(
        resumed,
        data=DataConfig(path="own.jsonl", seed=2),
        optimizer=OptimizerConfig(lr=2e-6, clip_grad=0.5),
        checkpoint=CheckpointConfig(keep=5),
    )
    expected = [
        'data.task="" (was chain_sum)',
        'data.path=own.jsonl (was "")',
        "data.seed=2 (was 1)",
        "optimizer.lr=2e-06 (was 1e-06)",
        "optimizer.clip_grad=0.5 (was 1.0)",
        "checkpoint.keep=5 (was 2)",
    ]
    assert changed_settings(checkpoint, changed) == expected
    (tmp_path / "copies").mkdir()
    assert changed_settings(tmp_path / "copies" / "step_000025", changed) == []  # without its run
    # A setting that an older version did not have is no change.
    file = tmp_path / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("  lr: ")))
    assert changed_settings(checkpoint, changed) == [line for line in expected if "lr" not in line]


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
    (fewer,) = changed(one)
    assert fewer.startswith('data.sources=[{"task": "chain_sum", "task_args": {}, ')
    assert fewer.count("...") == 2
    (cluster,) = changed(one, other, cluster=ClusterConfig(gpu="h200"))
    assert cluster.startswith("cluster={")
    assert cluster.endswith(" (was null)")


@pytest.mark.parametrize("text", ["a: [", "", "- 1", "\xff", "a: 2024-13-45", "data: {sources: [null, 3]}"])
def test_a_damaged_file_keeps_nobody_from_resuming(text: str, tmp_path: Path) -> None:
    checkpoint = attempt(tmp_path, BEFORE)
    (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
    changed = changed_settings(checkpoint, BEFORE)
    assert changed == [] or "sources" in text
    (tmp_path / "config.yaml").unlink()
    assert changed_settings(checkpoint, BEFORE) == []


@pytest.mark.parametrize("resume", ["auto", "explicit"])
@pytest.mark.parametrize("missing", ["weight_version", "state, step, weight_version"])
def test_a_checkpoint_without_state_to_resume_from_is_refused(tmp_path: Path, resume: str, missing: str) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    meta = {key: 3 for key in ("step", "state", "weight_version") if key not in missing} | {"model": {}}
    (folder / "meta.json").write_text(json.dumps(meta))
    checkpoint = CheckpointConfig(resume=str(folder) if resume == "explicit" else resume)
    with pytest.raises(UserError, match=rf"step_000003 holds no state to resume from.*has no {missing}\)"):
        find_resume(RunConfig(name="run", output_dir=str(tmp_path), checkpoint=checkpoint))


def test_checkpoint_with_an_empty_meta_file_is_passed_over(tmp_path: Path) -> None:
    for step, meta in ((25, '{"step": 25}'), (50, "")):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "meta.json").write_text(meta)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [25]


def test_partial_checkpoints_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("step_000037.partial", "step_000050", "step_000025.abandoned-1", "step_x.partial", "notes.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("notes.partial", "step_000025.abandoned-1", "step_000050", "step_x.partial")
    ]
