"""Check 28: the user's recipe in small, its memory by phase against that of its rehearsal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from megatron_aspo.config.load import load_config
from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.config.rollout import RolloutConfig
from megatron_aspo.config.run import RunConfig
from megatron_aspo.tools.gpu_check import lab as tools
from megatron_aspo.tools.gpu_check.records import ANY, Lab, Numbers, check, keep_largest
from megatron_aspo.tools.planning.architectures import find_hf_config
from megatron_aspo.tools.planning.gpus import KNOWN
from megatron_aspo.tools.planning.plan import make_plan
from megatron_aspo.tools.rehearsal.run import Job, rehearse_jobs

LAYERS = 2


def cut(lab: Lab) -> RunConfig:
    """One rank's shapes of the recipe on one GPU, with two layers and random weights; without a recipe, model D."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not lab.recipe:
        return tools.run_config(lab)
    config = load_config(lab.recipe, list(lab.overrides))
    length = config.model.max_sequence_length // config.parallel.context
    rollout = RolloutConfig(max_response_tokens=config.rollout.max_response_tokens // config.parallel.context)
    tokens = max(length, config.train.max_tokens_per_micro_batch // config.parallel.context)
    train = replace(config.train, max_tokens_per_micro_batch=tokens)
    config = replace(config, rollout=rollout, train=train, cluster=None, output_dir=lab.folder)
    model, parallel = replace(config.model, max_sequence_length=length), config.parallel
    if not model.hf_path:
        return replace(config, model=replace(model, num_layers=LAYERS), parallel=ParallelConfig())
    fields = cut_shape(find_hf_config(model.hf_path), parallel)
    folder, shape = lab.path / "recipe", lab.path / "shape"
    shape.mkdir(exist_ok=True)
    (shape / "config.json").write_text(json.dumps(fields))
    tools.write_model(lab, AutoConfig.from_pretrained(shape), AutoModelForCausalLM, folder)
    return replace(config, model=replace(model, hf_path=str(folder)), parallel=ParallelConfig())


def cut_shape(whole: Mapping[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    """The fields of config.json for one rank's part of two layers."""
    fields = {name: value for name, value in whole.items() if name not in ("quantization_config", "auto_map")}
    if "kv_lora_rank" not in fields:
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    shares = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "vocab_size"), parallel.tensor)
    shares |= {"intermediate_size": parallel.tensor, "moe_intermediate_size": parallel.expert_tensor_size}
    shares |= dict.fromkeys(("num_experts", "n_routed_experts"), parallel.expert)
    fields |= {name: max(1, fields[name] // share) for name, share in shares.items() if name in fields}
    fields |= {name: 1 for name in ("first_k_dense_replace", "n_group", "topk_group") if name in fields}
    if experts := fields.get("num_experts") or fields.get("n_routed_experts"):
        fields["num_experts_per_tok"] = min(fields["num_experts_per_tok"], experts)
    return fields | {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 0}


class Measured:
    """Takes the place of a rehearsal's tape: peak bytes and seconds of each phase."""

    def __init__(self, lab: Lab) -> None:
        self._memory = tools.Memory(lab)
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._memory.reset()
        start = time.monotonic()
        yield
        self.peaks[name] = self._memory.peak
        self._memory.reset()  # waits for the device
        self.seconds[name] = time.monotonic() - start


def make_job(lab: Lab, config: RunConfig, gpu: str | None = None) -> Job:
    """The job that is rehearsed and then measured, on the GPU of a plan."""
    plan = make_plan(config, 1, gpu)
    # Between saving and resuming, the phases clear what Transformer Engine keeps.
    return Job(config, 0, 1, plan.shape.vocab_size, 2, plan.gpu, resume=not lab.small)


def measure(lab: Lab, job: Job) -> Measured:
    """The program of a rehearsal on this device."""
    from megatron_aspo.policy.cpu import cuda

    cuda.import_megatron()
    from megatron_aspo.ranks.process_group import distributed
    from megatron_aspo.tools.rehearsal.phases import Phases

    measured = Measured(lab)
    with distributed(job.config):
        Phases(job, cast(Any, measured), lab.path / "phases").run()
    return measured


@check("28 recipe in small", 40, {"phases": (5, 99), "largest error": (0, 0.1), "tokens/s": ANY})
def recipe(lab: Lab) -> Numbers:
    """Peaks of all phases against the rehearsal's; tokens a second of an update."""
    config, name = cut(lab), torch.cuda.get_device_name().lower()
    job = make_job(lab, config, next((gpu for gpu in KNOWN if gpu in name), None))
    (trace,) = rehearse_jobs([job])
    measured = measure(lab, job)
    peaks = {phase: (trace.phases[phase].peak, peak) for phase, peak in measured.peaks.items() if phase in trace.phases}
    length, train = config.model.max_sequence_length, config.train
    streams = max(1, train.max_tokens_per_micro_batch // length) if train.packing else 1
    tokens = trace.micro_batches * streams * length
    found: Numbers = {f"{phase}: GiB": peak / (1 << 30) for phase, (_, peak) in peaks.items()}
    errors = {f"{phase}: error": peak / planned - 1 for phase, (planned, peak) in peaks.items()}
    for error in errors.values():
        keep_largest(found, {"largest error": abs(error)})
    return found | errors | {"phases": len(peaks)} | {"tokens/s": tokens / measured.seconds["update"]}
