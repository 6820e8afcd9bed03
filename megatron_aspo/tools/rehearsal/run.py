"""Rehearses ranks of a planned run, and checks its files, in processes of their own. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_aspo.config.checks import chunk_layers
from megatron_aspo.config.run import RunConfig
from megatron_aspo.errors import RunError, UserError
from megatron_aspo.tools.planning.architectures import Shape, local_config
from megatron_aspo.tools.planning.gpus import Gpu
from megatron_aspo.tools.planning.layout import training_ranks
from megatron_aspo.tools.planning.plan import Plan
from megatron_aspo.tools.rehearsal.agreement import find_troubles
from megatron_aspo.tools.rehearsal.events import Trace
from megatron_aspo.tools.rehearsal.lockstep import Meeting

ENGINE_VARIABLE = "MEGATRON_ASPO_TE"
"""Environment variable: folder of Transformer Engine's Python, for an environment without Transformer Engine 2.20."""

PROGRESS = "megatron-aspo: rehearsing "
"""Beginning of a rank's lines on standard error that name its phase."""


@dataclass(frozen=True)
class Job:
    """The rehearsal of one rank.

    Attributes:
        config: with `model.hf_path` a local folder.
        micro_batches: full-length streams of an update; the first of two updates takes fewer.
        save, resume: save a checkpoint, and continue from it.
        place: among all jobs, for the progress on standard error.
        meeting: address of a `lockstep.Meeting`, where ranks that run at the same time exchange values; "" without one.
        routing: of tokens to experts, "balanced", or "unequal": `shadows.spread`.
    """

    config: RunConfig
    rank: int
    world: int
    vocab_size: int
    micro_batches: int
    gpu: Gpu
    save: bool = True
    resume: bool = True
    place: str = ""
    meeting: str = ""
    routing: str = "balanced"


@dataclass(frozen=True)
class Parts:
    """Tensors that all kinds of ranks hold together.

    Attributes:
        kinds: of ranks: one per pipeline stage, tensor-parallel and expert-parallel position.
        tensors: of the model's files, each taken once; 0 for a model without files.
        checkpoint_tensors: of a checkpoint, each covered once.
        findings: tensors that are missing, spare, taken twice or of another size, a line each.
    """

    kinds: int
    tensors: int
    checkpoint_tensors: int
    findings: list[str]


def role_ranks(config: RunConfig, shape: Shape, world: int) -> list[int]:
    """The first rank of pipeline stages that differ.

    Stages between the first and the last have equally many layers. The earliest of them holds the most micro-batches
    at once, so it stands for later ones with the same layers.
    """
    stages, trained = config.parallel.pipeline, training_ranks(config, world)
    chunks = chunk_layers(shape.num_layers, config.parallel)
    kinds: dict[tuple[bool, bool, int, tuple[int, int]], int] = {}
    for stage, own in enumerate(chunks):
        held = [layer for chunk in own for layer in chunk]
        counts = (sum(map(shape.has_experts, held)), sum(map(shape.has_attention, held)))
        kinds.setdefault((stage == 0, stage == stages - 1, len(held), counts), stage)
    return [stage * (trained // stages) for stage in kinds.values()]


def neighbour(config: RunConfig, world: int) -> int:
    """The rank after rank 0 in its group of experts, or else of context- or tensor-parallel ranks or replicas; 0 if its
    stage has no other rank."""
    parallel = config.parallel
    rank = 1
    if parallel.expert > 1:
        rank = parallel.expert_tensor_size
    elif parallel.context > 1:
        rank = parallel.tensor
    return rank if rank < training_ranks(config, world) // parallel.pipeline else 0


def check_ready(plan: Plan, ranks: Sequence[int] = ()) -> None:
    """Raise UserError if a package is missing, the run is not for GPUs, or one of `ranks` is none of its ranks."""
    trained = training_ranks(plan.config, plan.world)
    if outside := [rank for rank in ranks if not 0 <= rank < trained]:
        raise UserError(f"--ranks={outside[0]} is none of the training ranks 0 to {trained - 1}")
    if (dtype := plan.config.model.dtype) != "bfloat16":
        raise UserError(
            f"model.dtype={dtype} is for CPUs; a GPU's attention has no such kernel: add model.dtype=bfloat16"
        )
    _python_path()
    # Transformer Engine's Python imports einops.
    if missing := [name for name in ("megatron", "einops") if importlib.util.find_spec(name) is None]:
        raise UserError(f"plan needs {', '.join(missing)}, not installed; pip install 'megatron-aspo[hf]'")


def rehearse(plan: Plan, ranks: Sequence[int] = (), save: bool = True) -> list[Trace]:
    """Traces of ranks of a planned run, by default of `role_ranks`.

    Args:
        save: the first of the ranks with the same parameters also saves a checkpoint and resumes from it, as it writes
            the states of all of them and reads them again.

    Raises:
        UserError: a setting is wrong for the program that runs.
        RunError: a rank's code fails.
    """
    parallel = plan.config.parallel
    with local_config(plan.config) as config:
        plan = replace(plan, config=config)
        stage = training_ranks(config, plan.world) // parallel.pipeline
        jobs = [_job(plan, rank) for rank in sorted(ranks or role_ranks(config, plan.shape, plan.world))]
        return rehearse_jobs([replace(job, save=save and job.rank % stage < parallel.tensor) for job in jobs])


def rehearse_neighbours(plan: Plan) -> tuple[list[Trace], list[str]]:
    """Traces of rank 0 and its `neighbour` up to the rollout, which exchange values and route tokens unequally, and how
    their calls disagree; no traces if one waits for ever, or if there is no neighbour."""
    if not (other := neighbour(plan.config, plan.world)):
        return [], []
    with local_config(plan.config) as config:
        job = replace(_job(replace(plan, config=config), 0), save=False, routing="unequal")
        places = ((0, " (1 of 2, together)"), (other, " (2 of 2, together)"))
        return rehearse_together([replace(job, rank=rank, place=place) for rank, place in places])


def _job(plan: Plan, rank: int) -> Job:
    """More micro-batches per update than pipeline stages, as few as these take."""
    config, count = plan.config, plan.config.parallel.pipeline + plan.config.parallel.rounds
    return Job(config, rank, training_ranks(config, plan.world), plan.shape.vocab_size, count, plan.gpu)


def check_parts(plan: Plan) -> Parts:
    """Build all kinds of ranks of a planned run, see `files`.

    Raises:
        UserError: Megatron-Core refuses the layout, or config.json and the files contradict each other.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with local_config(plan.config) as config, tempfile.NamedTemporaryFile() as result:
        command = [sys.executable, "-W", "ignore", "-m", "megatron_aspo.tools.rehearsal.files", result.name]
        job = pickle.dumps((config, training_ranks(config, plan.world), plan.shape.vocab_size))
        done = subprocess.run(command, input=job, env=environment, capture_output=True, check=False)
        if not done.returncode:
            return pickle.load(result)
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [""]
    if done.returncode == 2:
        raise UserError(lines[-1])
    raise RunError(f"the check of the model's files failed (exit code {done.returncode}): {lines[-1]}")


def rehearse_jobs(jobs: Sequence[Job]) -> list[Trace]:
    """A trace for each job, as many at a time as this machine has cores; GPUs of the first job."""
    environment = _environment()
    workers = min(len(jobs), os.cpu_count() or 1)
    jobs = [replace(job, place=f" ({i} of {len(jobs)})") for i, job in enumerate(jobs, 1)]
    traces: dict[int, Trace] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:  # each process imports Megatron-Core once
        shares = [range(len(jobs))[i::workers] for i in range(workers)]
        done = pool.map(lambda share: _rehearse_apart([jobs[i] for i in share], environment), shares)
        for share, found in zip(shares, done, strict=True):
            traces |= dict(zip(share, found, strict=True))
    return [traces[i] for i in range(len(jobs))]


def rehearse_together(jobs: Sequence[Job]) -> tuple[list[Trace], list[str]]:
    """Traces of ranks that run at the same time, and how they disagree; no traces if they could not go on."""
    environment = _environment()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        meeting = Meeting(f"{folder}/meeting", [job.rank for job in jobs])
        jobs = [replace(job, meeting=f"{folder}/meeting") for job in jobs]
        futures = [pool.submit(_rehearse_apart, [job], environment) for job in jobs]
        try:
            traces = [future.result()[0] for future in futures]
            return traces, [str(trouble) for trouble in find_troubles({trace.rank: trace.events for trace in traces})]
        except RunError:
            if meeting.trouble is None:
                raise
            return [], [str(meeting.trouble)]
        finally:
            meeting.close()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _python_path() -> str:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not _has_engine():
        checkout = Path(__file__).parents[3]
        folder = Path(os.environ.get(ENGINE_VARIABLE) or checkout / ".cache/te")
        if not (folder / "transformer_engine").is_dir():
            raise UserError(
                f"plan needs Transformer Engine 2.20's Python, and {folder} has none; run make rehearsal, or pip "
                f"install --no-deps --target FOLDER transformer_engine==2.20.2 and set {ENGINE_VARIABLE}=FOLDER"
            )
        paths.insert(0, str(folder))
    return os.pathsep.join(paths)


def _has_engine() -> bool:
    """Whether the version of Transformer Engine is installed that `engine` stands in for."""
    try:
        return importlib.metadata.version("transformer_engine").startswith("2.20.")
    except importlib.metadata.PackageNotFoundError:
        return False


def _rehearse_apart(jobs: Sequence[Job], environment: dict[str, str]) -> list[Trace]:
    """Rehearse ranks one after the other in a new process; pass its progress on."""
    lines = [""]
    with tempfile.NamedTemporaryFile() as result:
        command = [sys.executable, "-W", "ignore", "-m", "megatron_aspo.tools.rehearsal.rank", result.name]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environment) as process:
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(pickle.dumps(jobs))
            for line in process.stdout or ():
                text = line.decode(errors="replace").rstrip()
                if text.startswith(PROGRESS):
                    print(text, file=sys.stderr, flush=True)
                elif text:
                    lines.append(text)
        if process.returncode == 2:
            raise UserError(lines[-1])
        if process.returncode:
            print("\n".join(lines[1:]), file=sys.stderr, flush=True)
            named = f"rank {', '.join(str(job.rank) for job in jobs)} of {jobs[0].world}"
            raise RunError(f"{named} would fail (exit code {process.returncode}): {lines[-1]}")
        return pickle.load(result)
