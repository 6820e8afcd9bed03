"""The figure of weights equals the objectives; metrics, settings, files and links named on the pages exist."""

import ast
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from catalogue import catalogue, mentioned

from megatron_aspo.config.run import RunConfig
from megatron_aspo.loss import PolicyLossConfig, policy_loss
from megatron_aspo.loss.objectives import OBJECTIVES
from megatron_aspo.policy.hf.bridge import ARCHITECTURES
from megatron_aspo.tools.gpu_check.records import load_checks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *DOCS.glob("lab/*.md"), *DOCS.parent.glob("*.md"), *DOCS.parent.glob("examples/**/*.md")]


def load(name: str) -> ModuleType:
    """Import a module of the folder docs."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    return load("make_loss_picture")


@pytest.mark.parametrize(
    ("title", "positive", "negative"),
    [
        (
            "ASPO",
            {0.1: 3, 0.3: 3, 0.5: 2, 0.8: 1.25, 1: 1, 1.15: 1 / 1.15, 1.3: 0, 4: 0},
            {0.1: 0, 0.7: 0, 0.9: 0.9, 1: 1, 2: 2, 2.9: 2.9, 3.1: 3, 9: 3},
        ),
        ("GRPO, dual clip", {0.1: 0.1, 0.5: 0.5, 1.15: 1.15, 1.3: 0}, {0.7: 0, 0.9: 0.9, 2.9: 2.9, 3.1: 0}),
        ("DAPO", {0.5: 0.5, 1.25: 1.25, 1.3: 0}, {0.7: 0, 0.9: 0.9, 2.9: 2.9, 8: 8}),
        ("no_is", {0.1: 1, 1.15: 1, 1.3: 0}, {0.7: 0, 0.9: 1, 8: 1}),
        ("response_mean_is", {0.1: 0.7, 1.15: 0.7, 1.3: 0}, {0.7: 0, 0.9: 0.9, 2.9: 2.9, 3.1: 0}),
        ("GSPO", {0.1: 0.1, 1.15: 1.15, 1.3: 0}, {0.7: 0, 0.9: 0.9, 8: 8}),
        ("CISPO", {0.1: 0.8, 0.9: 0.9, 1.1: 1.1, 8: 1.2}, {0.1: 0.8, 0.9: 0.9, 1.1: 1.1, 8: 1.2}),
        # 4 sigmoid(x) (1 - sigmoid(x)) = 1 / cosh(x / 2)^2 with x = tau (r - 1)
        (
            "SAPO",
            {r: r / math.cosh(0.5 * (r - 1)) ** 2 for r in (0.5, 1, 2, 6)},
            {r: r / math.cosh(0.525 * (r - 1)) ** 2 for r in (0.5, 1, 2, 6)},
        ),
        ("aspo_unmasked", {0.1: 3, 0.5: 2, 1: 1, 1.3: 1 / 1.3, 4: 0.25}, {0.7: 0, 0.9: 0.9, 2.9: 2.9, 3.1: 3}),
        ("no_is_pos", {0.1: 1, 1.15: 1, 1.3: 0}, {0.7: 0, 0.9: 0.9, 8: 8}),
        ("up", {0.1: 1, 1.3: 1, 8: 1}, {0.7: 0, 0.9: 0.9, 8: 8}),
        ("GMPO", {0.1: 0.7, 1.4: 0.7, 1.6: 0}, {0.6: 0, 0.7: 0.7, 8: 0.7}),
        # The old probability is 0.1; the binary KL is 0.05 where the new one is 0.0313 and 0.2201.
        ("DPPO", {0.1: 0.1, 2.4: 2.4, 2.6: 0, 8: 0}, {0.1: 0.1, 0.7: 0.7, 8: 8}),
        ("dppo_kl", {0.1: 0.1, 2.1: 2.1, 2.3: 0, 8: 0}, {0.1: 0, 0.3: 0, 0.4: 0.4, 8: 8}),
        ("tis", {0.1: 0.1, 1.3: 1.3, 1.9: 1.9, 2.1: 2, 8: 2}, {0.1: 0.1, 1.3: 1.3, 1.9: 1.9, 2.1: 2, 8: 2}),
    ],
)
def test_curves_equal_the_table(
    picture: ModuleType, title: str, positive: dict[float, float], negative: dict[float, float]
) -> None:
    (axes,) = (axes for axes in picture.draw().axes if axes.get_title(loc="left") == title)
    lines = {line.get_label(): line for line in axes.lines}
    for label, expected in (("A > 0", positive), ("A < 0", negative)):
        r, w = lines[label].get_data()
        drawn = np.interp(list(expected), r[~np.isnan(r)], w[~np.isnan(r)])
        assert drawn == pytest.approx(np.array(list(expected.values()), dtype=float), abs=1e-5), label


def test_every_objective_has_a_panel(picture: ModuleType) -> None:
    assert {panel.config.objective for panel in picture.PANELS} == set(OBJECTIVES)


def test_every_metric_of_the_loss_is_in_the_catalogue() -> None:
    some = torch.tensor([[-1.0, -2.0]])
    out = policy_loss(
        some, some, some, some, PolicyLossConfig(), entropy=some, ref_logprobs=some, rollout_logprobs=some
    )
    assert {f"loss/{name}" for name in (*out.metrics, *out.maxima)} - set(catalogue()) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent)))
def test_links_lead_to_files(page: Path) -> None:
    """`make docs` checks the anchors."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_metrics_that_a_page_names_are_in_the_catalogue(page: Path) -> None:
    """tests/distributed/test_documented_metrics.py compares the catalogue with real runs."""
    assert sorted(mentioned(page.read_text(encoding="utf-8")) - set(catalogue())) == []


def settings_of(sphinx_ext: ModuleType, section: type[Any], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(name, description) of every setting below a section."""
    for name, inner in sphinx_ext.sections_of(section).items():
        if inner is None:
            yield prefix + name, sphinx_ext.documented_fields(section)[1].get(name)
        else:
            yield from settings_of(sphinx_ext, inner, f"{prefix}{name}.")


SETTINGS = dict(settings_of(load("sphinx_ext"), RunConfig))
SECTIONS = {name.partition(".")[0] for name in SETTINGS if "." in name}


def test_every_setting_has_a_description() -> None:
    """Docstrings below the fields are the reference of settings."""
    assert len(SETTINGS) > 120
    assert [name for name, text in SETTINGS.items() if not text] == []


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    spans = " ".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})(?:\.[a-z][a-z0-9_]*)+)(?![\w/(*])", spans)
    files = (".md", ".py", ".yaml", ".jsonl", ".png")
    known = {name[: match.start()] for name in SETTINGS for match in re.finditer(r"\.|$", name)}
    assert sorted({name for name in named if not name.endswith(files)} - known) == []


def test_counts_on_the_pages() -> None:
    counts = {
        "objectives": len(OBJECTIVES),
        "architectures": len(ARCHITECTURES),
        "checks": len({number for check in load_checks() if check.name[0].isdigit() for number in check.numbers}),
    }
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    found = re.findall(rf"(\d+) ({'|'.join(counts)})\b", " ".join(page.read_text(encoding="utf-8") for page in pages))
    assert {name for _, name in found} == set(counts)
    assert [(int(n), name) for n, name in found if int(n) != counts[name]] == []


def test_lines_of_the_adapters() -> None:
    folder = ROOT / "examples" / "integrations"
    sentence = re.search(r"an adapter \(`\*_aspo.py`: (.*?)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sentence is not None
    printed = {
        name.lower().replace("-", "_"): int(n)
        for name, n in re.findall(r"([\w-]+) (\d+)", sentence[1].replace(" lines", ""))
    }
    lines = {
        path.parent.name: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*/*_aspo.py")
    }
    assert printed == {name: lines[name] for name in printed}
    assert len(printed) == 5


@pytest.mark.parametrize("room", ["benchmarks", "examples", "megatron_aspo", "scripts", "tests"])
def test_docstrings_begin_with_their_subject(room: str) -> None:
    """A docstring can be read without the name beside it."""
    definitions = (ast.Module, ast.ClassDef, ast.FunctionDef)
    paths = sorted((ROOT / room).rglob("*.py"))
    assert paths
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, definitions) and (text := ast.get_docstring(node))
        if text.split()[0] in ("Of", "So", "That", "What", "Whose")
    ]
    assert found == []
