"""Mistakes with trackers, environments, advantages, objectives and warm-up: one line, exit code 2, and no model built.

Most of those with models are in tests/engines/test_weights.py.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.ssm.gated_delta_net import common as mcore_delta_net
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet

from megatron_aspo.commands.arguments import exit_code
from megatron_aspo.config.load import load_config
from megatron_aspo.policy import layer_specs
from megatron_aspo.policy.layer_specs import block_spec
from megatron_aspo.tools.planning.architectures import KINDS, shape_of_hf
from megatron_aspo.train import train

MODULE = """
from megatron_aspo.batch import Prompt

number = 3

class Mute:
    def reset(self, prompt: Prompt) -> None: ...

class Forgetful:
    def step(self, response: str) -> None: ...

class Deaf(Mute):
    def step(self) -> None: ...

class Hasty(Forgetful):
    def reset(self) -> None: ...

class Away(Deaf):
    def __init__(self) -> None:
        raise ConnectionRefusedError("no server")

class Table(Mute):
    def __init__(self, size: int) -> None: ...

def halves(groups, config):
    return groups
"""

NO_IMPORT = "is the name right, and its folder in PYTHONPATH?"
BROKEN = "its module fails with ZeroDivisionError: division by zero"
ENDS = "change one of them"

LINES = {
    # trackers
    "journal.trackers=[wandbb]": "journal.trackers='wandbb' is neither one of tensorboard, wandb, mlflow nor an import "
    "path module:name; did you mean wandb?",
    "journal.trackers=[mlflow, mlflow]": "journal.trackers names one twice; remove it",
    "journal.trackers=wandb": "journal.trackers='wandb' should be a list",
    "journal.trackers=[nowhere:Tracker]": f"cannot import nowhere:Tracker: No module named 'nowhere'; {NO_IMPORT}",
    "journal.trackers=[broken:Tracker]": f"cannot import broken:Tracker: {BROKEN}",
    "journal.trackers=[mine:number]": "mine:number is not a function or class; name one as module:name",
    "journal.trackers=[mine:Table]": "mine:Table(size: int) -> None must take (config, resume_step): too many "
    "positional arguments",
    # environments
    "rollout.environment=pyton": "rollout.environment='pyton' is neither one of python, retry, sokoban nor an import "
    "path module:name; did you mean python?",
    "rollout={environment: python, engine: 'my:Engine'}": "rollout.environment=python needs engine=vllm or megatron, "
    "which continue responses; set one",
    "rollout={environment: python, engine: vllm, ranks: 1, max_staleness: 1, in_flight: true}": (
        "rollout.in_flight=true cannot be combined with environment; set in_flight=false"
    ),
    "rollout={environment: python, max_turns: 0}": "rollout.max_turns=0 should be greater than 0",
    "rollout={environment: python, environment_seconds: 0}": "rollout.environment_seconds=0 should be greater than 0",
    "rollout.environment=nowhere:Game": f"cannot import nowhere:Game: No module named 'nowhere'; {NO_IMPORT}",
    "rollout.environment=mine:Gone": f"cannot import mine:Gone: module 'mine' has no attribute 'Gone'; {NO_IMPORT}",
    "rollout.environment=broken:Game": f"cannot import broken:Game: {BROKEN}",
    "rollout.environment=mine:number": "mine:number is not a function or class; name one as module:name",
    "rollout.environment=mine:Table": "mine:Table(size: int) -> None must take (): missing a required argument: 'size'",
    "rollout.environment=mine:Away": "rollout.environment=mine:Away() fails: ConnectionRefusedError: no server; fix it",
    "rollout.environment=mine:Forgetful": "rollout.environment=mine:Forgetful has no method reset; Environment "
    "requires it",
    "rollout.environment=mine:Mute": "rollout.environment=mine:Mute has no method step; Environment requires it",
    "rollout.environment=mine:Hasty": "mine:Hasty.reset() -> None must take (prompt): too many positional arguments",
    "rollout.environment=mine:Deaf": "mine:Deaf.step() -> None must take (response): too many positional arguments",
    "rollout.environment=retry; data.path=a.json": "rollout.environment=retry needs data.task, not "
    f"data.path=a.json; {ENDS}",
    "rollout.environment=sokoban; data.sources=[{task: sokoban}, {task: gcd}]": "rollout.environment=sokoban needs "
    f"data.task=sokoban, not data.task=gcd; {ENDS}",
    "rollout.environment=sokoban": "rollout.environment=sokoban needs data.task=sokoban, not data.task=chain_sum; "
    f"{ENDS}",
    # advantages
    "rollout.advantage=rlo": "rollout.advantage='rlo' is neither one of grpo, no_std, rloo, reinforce++, "
    "reinforce++_baseline, maxrl nor an import path module:name; did you mean rloo?",
    "rollout.advantage=nowhere:f": f"cannot import nowhere:f: No module named 'nowhere'; {NO_IMPORT}",
    "rollout.advantage=broken:f": f"cannot import broken:f: {BROKEN}",
    "rollout.advantage=mine:number": "mine:number is not a function or class; name one as module:name",
    "rollout.advantage=mine:halves": "mine:halves(groups, config) must take (groups): missing a required argument: "
    "'config'",
    "rollout.advantage=maxrl; reward.overlong_buffer=2": "rollout.advantage=maxrl needs rewards >= 0; set "
    "reward.overlong_buffer=0, or another advantage",
    # objectives and warm-up
    "loss.objective=dpo": "loss.objective='dpo' is neither one of aspo, grpo, no_is, response_mean_is, aspo_unmasked, "
    "no_is_pos, up, tis, cispo, gspo, gmpo, dppo, dppo_kl, sapo nor an import path module:name; did you mean dppo?",
    "warmup={updates: 4, lr_decay: true}": "warmup.lr_decay=true needs more warmup.updates=4 than "
    "optimizer.lr_warmup_updates=10; raise the first",
}


@pytest.mark.parametrize("settings", LINES)
def test_one_line_and_exit_code_2(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "run.yaml").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert exit_code(lambda: int(train(load_config("run.yaml", settings.split("; ")), ()))) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"megatron-aspo: {LINES[settings]}\n")
    assert not (tmp_path / "runs").exists()


def test_models_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def line_of(build: Callable[[], object]) -> str:
        assert exit_code(lambda: bool(build())) == 2
        return capsys.readouterr().err

    net: Any = SimpleNamespace(experimental_attention_variant="gated_delta_net", fp8="hybrid", bf16=True)
    in_fp8 = "megatron-aspo: gated delta nets have not been tried in FP8; set fp8.recipe=null\n"
    assert line_of(lambda: block_spec(net)) == in_fp8
    monkeypatch.setattr(layer_specs, "uses_engine", lambda: True)  # as on a GPU with Transformer Engine alone
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(mcore_delta_net, "HAVE_FLA", False)
    net.fp8 = None
    no_kernels = "megatron-aspo: gated delta nets on a GPU need kernels; pip install flash-linear-attention\n"
    assert line_of(lambda: block_spec(net)) == no_kernels
    for kind in GatedDeltaNet.__mro__:
        if "_resolve_cu_seqlens" in vars(kind):  # as in another Megatron-Core
            monkeypatch.delattr(kind, "_resolve_cu_seqlens")
    with pytest.raises(AssertionError, match="finds segments by another function"):
        block_spec(net)
    unknown = line_of(lambda: shape_of_hf({"model_type": "gpt2"}, "folder"))
    assert unknown == f"megatron-aspo: model.hf_path=folder is a gpt2 model; {', '.join(KINDS)} are known\n"
