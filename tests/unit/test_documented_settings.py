"""Configurations, commands and advice on the pages are accepted as printed."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_aspo.cli import build_parser
from megatron_aspo.commands.arguments import parse
from megatron_aspo.config.checks import check_world_size
from megatron_aspo.config.load import load_config
from megatron_aspo.config.run import RunConfig
from megatron_aspo.tools.planning.plan import make_plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}
SETTING = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*=\S+")

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "hidden_act": "silu"},
    **{"attention_bias": False, "use_sliding_window": False},
}
"""The shape of README's model, https://huggingface.co/Qwen/Qwen3-8B."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\b.*\n((?s:.*?))^```$", page.read_text(encoding="utf-8"), re.MULTILINE)


BASE = """
name: page
model: {hf_path: published, dtype: bfloat16, max_sequence_length: 16384}
rollout: {engine: vllm, max_response_tokens: 1024}
train: {max_tokens_per_micro_batch: 16384}
"""
"""The run that parts of a configuration on a page belong to."""


def whole_files(page: Path) -> list[str]:
    """Configurations of whole runs on a page: those with a name."""
    return [text for text in blocks(page, "yaml") if text.startswith("name:")]


def parts(page: Path) -> list[str]:
    """Parts of configurations on a page: those that begin with a section."""
    found = [text for text in blocks(page, "yaml") if not text.startswith("name:")]
    return [text for text in found if next(iter(yaml.safe_load(text))) in SECTIONS]


README_FILE, *_ = whole_files(ROOT / "README.md")


def commands(page: Path) -> list[list[str]]:
    """Words of each command on a page behind `megatron-aspo`; in the text those that name a configuration."""
    code = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    code += re.findall(r"`(megatron-aspo [^`\n]+\.yaml[^`\n]*)`", page.read_text(encoding="utf-8"))
    return [shlex.split(line, comments=True)[1:] for line in code if line.startswith("megatron-aspo ")]


WITH_FILES = [page for page in PAGES if whole_files(page)]
WITH_PARTS = [page for page in PAGES if parts(page)]
WITH_COMMANDS = [page for page in PAGES if commands(page)]


def test_pages_have_files_parts_and_commands() -> None:
    assert sum(len(whole_files(page)) for page in PAGES) >= 4
    assert sum(len(parts(page)) for page in PAGES) >= 5
    assert sum(len(commands(page)) for page in PAGES) >= 20


@pytest.mark.parametrize("page", WITH_FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_on_a_page_are_accepted(page: Path, tmp_path: Path) -> None:
    for text in whole_files(page):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("page", WITH_PARTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_parts_on_a_page_are_accepted(page: Path, tmp_path: Path) -> None:
    for text in parts(page):
        both = OmegaConf.merge(OmegaConf.create(BASE), OmegaConf.create(text))
        (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(both), encoding="utf-8")
        load_config(tmp_path / "run.yaml")


def test_names_of_runs_differ_between_pages() -> None:
    """A reader of two pages would else overwrite a file, and continue the run of the first with the second's."""
    names = [yaml.safe_load(text)["name"] for page in WITH_FILES for text in whole_files(page)]
    assert len(names) >= 4
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_a_page_are_accepted(page: Path, tmp_path: Path) -> None:
    """`mine.yaml` is README's."""
    (tmp_path / "mine.yaml").write_text(README_FILE, encoding="utf-8")
    others = dict(re.findall(r'^```yaml title="([\w.]+)"\n((?s:.*?))^```$', page.read_text("utf-8"), re.MULTILINE))
    for words in commands(page):
        arguments = parse(build_parser(), words)
        file = getattr(arguments, "config", "")
        if file in others:
            (tmp_path / file).write_text(others[file], encoding="utf-8")
        if file.endswith(".yaml"):
            config = load_config((ROOT if file.startswith("examples/") else tmp_path) / file, arguments.overrides)
            if ranks := getattr(arguments, "nproc", None):
                check_world_size(config.parallel, config.rollout, ranks)


def test_readmes_own_model_fits_its_layout(tmp_path: Path) -> None:
    """`plan` checks vLLM's cache and heads against Qwen3-8B, on one host of eight GPUs."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_8B))
    (tmp_path / "mine.yaml").write_text(README_FILE, encoding="utf-8")
    config = load_config(tmp_path / "mine.yaml", [f"model.hf_path={tmp_path / 'model'}"])
    assert make_plan(config, 8).world == 8
    assert "boxed" in config.data.prompt_template


CONDITIONS = {"loss.anchor=rollout", "fp8.recipe=delayed", "rollout.engine=megatron"}
"""Settings that the page names as conditions, not as advice."""

TROUBLESHOOTING = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ADVICE = sorted(
    {span for span in re.findall(r"`([^`\n]+)`", TROUBLESHOOTING) if all(map(SETTING.fullmatch, span.split()))}
    - CONDITIONS
)


@pytest.mark.parametrize("recipe", ["qwen2_5_32b", "qwen3_32b"])
def test_advice_fits_the_recipes(recipe: str) -> None:
    advice = [span for span in ADVICE if "." in span.partition("=")[0]]
    assert len(advice) > 20
    for span in advice:
        load_config(ROOT / "examples" / f"{recipe}.yaml", span.split())
