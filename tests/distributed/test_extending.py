"""Files and commands of docs/extending.md, run as printed, give the expected numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

from megatron_aspo.batch import Prompt
from megatron_aspo.commands.train import run as train
from megatron_aspo.config.data import DataConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.config.training import WarmupConfig
from megatron_aspo.data.tokenizer import load_tokenizer
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.journal.log import read_metrics
from megatron_aspo.loss import PolicyLossConfig, TokenInputs
from megatron_aspo.policy.trainer import Policy
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.rollout.build import build_engine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def module_of(folder: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in bash, after the page's first line."""
    # Uses the environment's programs and the package of this checkout, even if another version is installed.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = f"{COMMANDS[0]}\n{command}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Responses of `samples.jsonl`, each with its prompt and step."""
    groups = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{**r, "prompt": g["prompt"], "step": g["step"]} for g in groups for r in g["responses"]]


@pytest.mark.parametrize("name", ["my_objectives.py", "my_rewards.py", "problems.jsonl"])
def test_a_part_is_a_diff_of_twelve_lines(name: str) -> None:
    setting = name.partition(".")[0]
    (line,) = [line for line in FILES["custom.yaml"].splitlines() if setting in line]
    assert len([line, *filter(None, FILES[name].splitlines())]) <= 12


def test_the_objective(folder: Path) -> None:
    ratio, advantage = [1.0, 0.25, 0.01, 1.3, 4.0, 0.5, 100.0], [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    r, a = torch.tensor(ratio), torch.tensor(advantage)
    edge = torch.full_like(r, 0.2)
    x, config = TokenInputs(r.log(), r, a, edge, edge, r), PolicyLossConfig(dual_clip=3.0)
    terms = module_of(folder, "my_objectives").root_aspo(x, config)
    assert terms.weight.tolist() == pytest.approx([1, 2, 3, 0, 2, 0, 3])
    assert terms.hard_clipped.tolist() == [False, False, False, True, False, True, False]


def root_weight(ratio: float, advantage: float) -> float:
    if (advantage > 0 and ratio > 1.2) or (advantage <= 0 and ratio < 0.8):
        return 0.0
    return min(math.sqrt(1 / ratio if advantage > 0 else ratio), 3)


def engine(policy: Any, config: Any, tokenizer: Any, seed: int) -> Any:
    """Stands for the constructor of an engine."""


@pytest.mark.parametrize(
    ("section", "parts", "named"),
    [
        ({"rollout": RolloutConfig(engine="vllm", ranks=1)}, {"rollout": print}, "rollout.ranks"),
        ({"rollout": RolloutConfig(oversample=1.5)}, {"rollout": engine}, "rollout.oversample=1.5 needs an engine"),
        ({"rollout": RolloutConfig(environment="retry")}, {"rollout": engine}, "rollout.environment=retry needs an"),
        ({}, {"rollout": len}, "rollout"),
        ({}, {"prompts": lambda: None}, "prompts"),
        ({"data": DataConfig(task="gcd")}, {"prompts": len}, "data.task"),
        ({"data": DataConfig(path="a.json")}, {"prompts": len}, "data.path"),
        ({"warmup": WarmupConfig(updates=3)}, {"prompts": len}, "warmup.updates"),
        ({"rollout": RolloutConfig(prompts_per_step=4)}, {}, "train.mini_batch_prompts"),
    ],
)
def test_errors_of_a_program_name_the_setting(section: dict[str, Any], parts: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        train(RunConfig("x", **section), **parts)


PROMPTS = [Prompt(i, "", (1, 2, 3), {}) for i in range(3)]


def two_opinions(folder: Path) -> str:
    """The error of a rank whose engine samples with another seed."""
    config = ranks.run_config()
    guess = module_of(folder, "my_engines").Guess
    with distributed(config):
        tokenizer = load_tokenizer(config.model, config.data)
        policy = Policy(config, tokenizer.vocab_size)
        engines = [build_engine(policy, config.rollout, tokenizer, seed, engine=guess) for seed in (1, dist.get_rank())]
        for engine in engines:
            engine.refit()
        assert len(engines[0].generate(PROMPTS, 2, 1.0)) == 6
        with pytest.raises(RunError) as failure:
            engines[1].generate(PROMPTS, 2, 1.0)
        return str(failure.value)


@pytest.mark.distributed
def test_ranks_must_agree(folder: Path) -> None:
    assert all("rollout.engine" in message for message in ranks.run(2, two_opinions, folder))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_with_all_of_them(folder: Path) -> None:
    done = run(folder, COMMANDS[1])
    assert done.returncode == 0, done.stderr
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, FILES["problems.jsonl"].splitlines())}
    samples = logged(folder / "runs" / "custom")
    assert {sample["step"] for sample in samples} == {1, 2}
    assert len(samples) == 2 * 4 * 4
    tokens = 0
    for sample in samples:
        assert re.fullmatch(r"\d\d", sample["text"])
        assert sample["score"] == pytest.approx(1 / (1 + abs(int(sample["text"]) - answers[sample["prompt"]])))
        for ratio, weight in zip(sample["ratio"], sample["weight"], strict=True):
            assert weight == pytest.approx(root_weight(ratio, sample["advantage"]), rel=1e-4, abs=1e-6)
            tokens += weight not in (0, 1)
    assert tokens > 0  # weights that only this objective gives
    step = [line for line in read_metrics(folder / "runs" / "custom") if "loss/log_ratio_max_first" in line][-1]
    assert step["loss/log_ratio_max_first"] < 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_from_a_program_on_two_ranks(folder: Path) -> None:
    done = run(folder, COMMANDS[3].replace("--nproc", "--standalone --nproc"))  # any free port
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2  # ranks end together, so that their lines may mix
    samples = logged(folder / "runs" / "products")
    assert len(samples) == 4 * 4
    for sample in samples:
        a, b = re.fullmatch(r"(\d)\*(\d)=", sample["prompt"]).groups()  # type: ignore[union-attr]
        assert sample["score"] == pytest.approx(1 / (1 + abs(int(sample["text"]) - int(a) * int(b))))


@pytest.mark.distributed
@pytest.mark.slow
def test_one_stage_at_a_time(folder: Path) -> None:
    done = run(folder, COMMANDS[4])
    assert done.returncode == 0, done.stderr
    updates, ratio = re.fullmatch(r"(\d+) updates, largest log-ratio in the first (\S+)\n", done.stdout).groups()  # type: ignore[union-attr]
    assert int(updates) == 3  # one per epoch
    assert float(ratio) <= 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_of_several_turns_with_a_tracker(folder: Path) -> None:
    assert len(FILES["turns.yaml"].splitlines()) <= 8
    (trackers,) = re.findall(r"journal: {trackers: \[(.*)\]}", FILES["turns.yaml"])
    every = f"'journal.trackers=[{trackers}, wandb, mlflow]'"
    done = run(folder, f"export WANDB_MODE=offline MLFLOW_TRACKING_URI=$PWD/mlruns\n{COMMANDS[5]} {every}")
    assert done.returncode == 0, done.stderr
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, FILES["problems.jsonl"].splitlines())}
    said = set[str]()
    for sample in logged(folder / "runs" / "turns"):
        pieces, answer = iter(sample["tokens"]), answers[sample["prompt"]]
        parts = [(version, "".join(next(pieces) for _ in range(count))) for version, count in sample["versions"]]
        for (_, turn), (version, observation) in zip(parts[::2], parts[1::2], strict=False):
            assert version == -1
            guess = int(turn) if turn.isdigit() else 0
            assert observation == ("<" if guess < answer else ">")
            said.add(observation)
        if sample["finish_reason"] == "stop":
            assert sample["score"] == (parts[-1][1] == str(answer))
    assert said
    (train,) = [line for line in read_metrics(folder / "runs" / "turns") if line["phase"] == "train"]
    rewards = (folder / "runs" / "turns" / "rewards.txt").read_text().splitlines()
    assert f"1 {train['reward/mean']}" in rewards
    (logged_by_mlflow,) = (folder / "mlruns").glob("*/*/metrics/reward/mean")
    assert float(logged_by_mlflow.read_text().splitlines()[0].split()[1]) == pytest.approx(train["reward/mean"])
    assert list((folder / "runs" / "turns").rglob("run-*.wandb")), done.stderr
    assert list((folder / "runs" / "turns").rglob("events.out.tfevents.*"))
