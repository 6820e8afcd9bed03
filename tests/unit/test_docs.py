"""The documentation's picture shows what the table of weights says, and its tables name every metric; settings, metrics
and messages that docs/operations.md names are there."""

import ast
import dataclasses
import importlib.util
import math
import re
import struct
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from catalogue import catalogue, mentioned

from megatron_aspo.config import RunConfig
from megatron_aspo.loss import PolicyLossConfig, policy_loss
from megatron_aspo.loss.objectives import OBJECTIVES
from megatron_aspo.progress import SHOWN

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_loss_picture", DOCS / "make_loss_picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_picture_is_written(picture: ModuleType, tmp_path: Path) -> None:
    picture.main(tmp_path / "picture.png")
    assert png_size(tmp_path / "picture.png") == png_size(DOCS / "loss_weights.png") == (1500, 1050)
    assert (tmp_path / "picture.png").stat().st_size < 200_000


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
    titles = {axes.get_title(loc="left") for axes in picture.draw().axes}
    assert titles == {panel.title for panel in picture.PANELS} | {""}  # the legend has none


def test_every_metric_is_explained() -> None:
    some = torch.tensor([[-1.0, -2.0]])
    out = policy_loss(
        some,
        some,
        some,
        some,
        PolicyLossConfig(),
        entropy=some,
        ref_logprobs=some,
        rollout_logprobs=some,
    )
    text = (DOCS / "loss.md").read_text(encoding="utf-8")
    # The page says what _pos and _neg are once, for all.
    names = {name.removesuffix("_pos").removesuffix("_neg") for name in out.metrics}
    assert [name for name in names if f"`{name}`" not in text and f"`{name}_pos`" not in text] == []


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md"), *DOCS.parent.glob("examples/**/*.md")])
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), DOCS.parent / "README.md"])
def test_metrics_that_a_page_names_are_in_the_catalogue(page: Path) -> None:
    """The catalogue itself is held against real runs by tests/distributed/test_documented_metrics.py."""
    assert sorted(mentioned(page.read_text(encoding="utf-8")) - set(catalogue())) == []


def test_the_progress_line_is_explained() -> None:
    assert [
        row for label, short, key, _ in SHOWN if (row := f"| `{short}` | {label} | `{key}` |") not in OPERATIONS
    ] == []


def settings_of(section: Any, prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, hint in typing.get_type_hints(section).items():
        if name not in {field.name for field in dataclasses.fields(section)}:
            continue
        names.add(prefix + name)
        for kind in (hint, *typing.get_args(hint)):
            names |= settings_of(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else set()
    return names


def test_settings_that_operations_names_exist() -> None:
    known = settings_of(RunConfig)
    sections = {name.partition(".")[0] for name in known if "." in name}
    found = re.findall(rf"(?<![\w./-])((?:{'|'.join(sections)})(?:\.[a-z][a-z0-9_]*\*?)+)(?![\w/(])", OPERATIONS)
    named = {name for name in found if not name.endswith((".md", ".py", ".yaml", ".jsonl", ".save", ".load"))}
    assert len(named) > 60
    starts = tuple(name.removesuffix("*") for name in named if name.endswith("*"))
    assert [start for start in starts if not any(name.startswith(start) for name in known)] == []
    assert sorted(name for name in named - known if not name.endswith("*")) == []


def messages() -> list[str]:
    """Every text of the package, with {} for what is filled in, and the lines of the jobs."""
    root = DOCS.parent
    texts = [(root / "slurm" / "body.sh").read_text(encoding="utf-8")]
    for path in (root / "megatron_aspo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_lines_that_operations_quotes_are_printed_by_the_code() -> None:
    table = OPERATIONS.split("| a line on stderr has | section |")[1].split("\n\n")[0]
    cells = re.findall(r"^\|([^|]+)\|", table, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 15
    texts = messages()
    assert [text for text in quoted if not any(text in one for one in texts)] == []


def test_links_within_operations_lead_to_headings() -> None:
    """And those from it to another page's headings."""
    for page, anchor in re.findall(r"\]\(([\w/.]*)#([\w-]+)\)", OPERATIONS):
        text = (DOCS / page).read_text(encoding="utf-8") if page else OPERATIONS
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{page}#{anchor}"
