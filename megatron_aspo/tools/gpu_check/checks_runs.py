"""Checks 25 to 27 and 30: whole runs by their command line, the check of nodes, and lanes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError
from megatron_aspo.journal.log import METRICS_FILE, read_metrics
from megatron_aspo.ranks.lanes import WEIGHTS
from megatron_aspo.ranks.launch import PORTS
from megatron_aspo.ranks.process_group import distributed
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import ANY, Lab, Numbers, check


def _write_run(lab: Lab, name: str, **sections: Any) -> Path:
    """The file of a run of three steps from random weights."""
    model: dict[str, Any] = {"num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 3072, "dtype": "bfloat16"}
    model |= {"num_attention_heads": 16, "num_query_groups": 8, "max_sequence_length": 64}
    if lab.small:
        model |= {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 64, "num_attention_heads": 4}
        model |= {"num_query_groups": 2, "dtype": "float32"}
    run: dict[str, Any] = {
        "name": name,
        "output_dir": str(lab.path / "runs"),
        "model": model,
        "data": {
            "task": "chain_sum",
            "task_args": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "prompt_template": "{expression} =",
            "eval_prompts": 8,
        },
        "rollout": {
            "prompts_per_step": 8,
            "responses_per_prompt": 4,
            "max_response_tokens": 8,
            "dynamic_sampling": False,
        },
        "train": {"steps": 3, "mini_batch_prompts": 4, "epochs": 1},
        "checkpoint": {"every": 1},
        "eval": {"every": 0, "at_start": False, "at_end": False},
    }
    for section, values in sections.items():
        run[section] = run.get(section, {}) | values
    file = lab.path / f"{name}.yaml"
    file.write_text(json.dumps(run))
    return file


def _steps(lab: Lab, name: str) -> list[dict[str, Any]]:
    folder = lab.path / "runs" / name
    written = (folder / METRICS_FILE).is_file()
    return [record for record in read_metrics(folder) if record["phase"] == "train"] if written else []


@check("25 rollout ranks", 75, {"steps": (3, 3), "stale": (0, 1), "KL": (0, 4e-3)}, gpus=8, on_cpu=True)
def rollout_ranks(lab: Lab) -> Numbers:
    """Three steps with four ranks that train and four that only sample, a batch ahead, with checksums."""
    half = 1 if lab.small else 4
    rollout = {"engine": "vllm", "ranks": half, "max_staleness": 1, "refit_checksum": True}
    file = _write_run(lab, "remote", rollout=rollout | {"kv_cache_gb": 0.05 if lab.small else 2})
    tools.run_command("train", str(file), "--nproc", str(2 * half))
    steps = _steps(lab, "remote")
    stale = max(step["rollout/staleness"] for step in steps)
    return {"steps": len(steps), "stale": stale, "KL": steps[0]["mismatch/kl"]}


@check("26 stop and resume", 120, {"stopped after": (1, 99), "more": (1, 1)}, gpus=8, on_cpu=True)
def stop_and_resume(lab: Lab) -> Numbers:
    """USR1 in a run at TP 4; the same run continued at TP 2, PP 2."""
    before, after = (["parallel.tensor=4"], ["parallel.tensor=2", "parallel.pipeline=2"])
    if lab.small:
        before, after = ["parallel.tensor=2"], ["parallel.tensor=1", "parallel.pipeline=2"]
    ranks, file = ["--nproc", "2" if lab.small else "8"], _write_run(lab, "stopped", train={"steps": 100})
    run = subprocess.Popen([sys.executable, "-m", "megatron_aspo", "train", str(file), *before, *ranks])
    while not _steps(lab, "stopped"):
        if run.poll() is not None:
            raise RunError(f"the run ended with {run.returncode} before its first step")
        time.sleep(0.2)
    psutil.Process(run.pid).children()[0].send_signal(signal.SIGUSR1)
    if run.wait():
        raise RunError(f"the stopped run ended with {run.returncode}")
    stopped = _steps(lab, "stopped")[-1]["step"]
    tools.run_command("train", str(file), f"train.steps={stopped + 1}", *after, *ranks, "--resume", "auto")
    return {"stopped after": stopped, "more": _steps(lab, "stopped")[-1]["step"] - stopped}


@check("27 nodes", 45, {"nodes": (2, 2), "slowest GB/s": ANY}, gpus=8, on_cpu=True)
def nodes(lab: Lab) -> Numbers:
    """`node_check` with half of the GPUs as a node each."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    folder = lab.path / "nodes"
    folder.mkdir(exist_ok=True)
    file = str(_write_run(lab, "nodes"))
    module = [sys.executable, "-m", "megatron_aspo.commands.node_check"]
    command = [*module, file, "--ranks", "8", "--log-dir", str(folder)]
    variables = {"NODE_NAMES": "first second", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(PORTS[os.getpid() % len(PORTS)])
    tasks: list[subprocess.Popen[str]] = []
    for rank, part in enumerate((gpus[: len(gpus) // 2], gpus[len(gpus) // 2 :])):
        environment = os.environ | variables | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": ",".join(part)}
        tasks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [task.communicate()[0] for task in tasks]
    print(*outputs)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) GB/s", outputs[0])]
    return {"nodes": sum(task.returncode == 0 for task in tasks), "slowest GB/s": min(rates)}


def lanes_rank(lab: Lab) -> Numbers:
    """One rank: tensors from a training rank to a rollout rank, through host memory and between GPUs."""
    size, count = (1 << 16 if lab.small else 1 << 28), 8
    config = RunConfig(name="lanes", rollout=RolloutConfig(engine="vllm", ranks=1))
    with distributed(config) as channel:
        assert channel is not None
        lanes, rates, wrong = channel.lanes, list[float](), 0
        for device in (torch.device("cpu"), lanes.device):
            flat = torch.arange(size, dtype=torch.int32, device=device).view(torch.uint8)[:size]
            if channel.role == "training":
                for i in range(count):
                    if i == 1:  # the first one connects
                        started = time.monotonic()
                    lanes.send(0, flat + i, WEIGHTS).result()
                rates.append((count - 1) * size / (time.monotonic() - started) / 1e9)
            else:
                for i in range(count):
                    received = lanes.receive(0, torch.empty_like(flat), WEIGHTS)
                    wrong += int((received != flat + i).sum())
        if channel.role == "training":
            return {"different": channel.receive(), "host GB/s": rates[0], "GPU GB/s": rates[1]}
        channel.send(wrong)
        channel.receive()
        return {}


@check("30 lanes", 25, {"different": (0, 0), "host GB/s": ANY, "GPU GB/s": ANY}, gpus=2, on_cpu=True)
def lanes(lab: Lab) -> Numbers:
    """Two ranks, each a world of its own, with a lane between them."""
    return tools.on_ranks(lab, f"{__name__}:lanes_rank", RunConfig(name="lanes"), 2)
