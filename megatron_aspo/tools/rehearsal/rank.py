"""One rank on fake GPUs: the process that rehearses its phases.

Importing this changes torch and Megatron-Core for the whole process, so a plan rehearses in processes of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_aspo.errors import UserError
from megatron_aspo.tools.rehearsal import collectives, engine, fake_gpu
from megatron_aspo.tools.rehearsal.costs import Costs, bytes_touched
from megatron_aspo.tools.rehearsal.events import Trace, code_line
from megatron_aspo.tools.rehearsal.fake_gpu import FakeTensor, FakeTensorMode
from megatron_aspo.tools.rehearsal.lockstep import Partner
from megatron_aspo.tools.rehearsal.run import Job
from megatron_aspo.tools.rehearsal.shadows import real, shadow_of, tensors_in
from megatron_aspo.tools.rehearsal.tape import Tape

_tapes: list[Tape] = []


def _tape_now() -> Tape | None:
    return _tapes[-1] if _tapes else None


@functools.cache
def install(capability: tuple[int, int], memory: int) -> None:
    """Change this process, once and for good, into one with simulated GPUs."""
    os.environ["MEGATRON_ASPO_KERNELS"] = "auto"
    collectives.install(_tape_now)  # Megatron-Core binds some of them when it is imported
    engine.install(engine.extension(_tape_now, capability))
    _record_triton()

    def on_sync(what: str) -> None:
        if tape := _tape_now():
            tape.sync(what)

    fake_gpu.pretend(on_sync, capability, memory)
    torch.Tensor.tolist = FakeTensor.tolist = _tolist  # type: ignore[method-assign, assignment]
    resize = torch.UntypedStorage.resize_

    def resize_and_account(storage: Any, size: int) -> Any:
        if tape := _tape_now():
            tape.resized(storage, size)
        return resize(storage, size)

    torch.UntypedStorage.resize_ = resize_and_account  # type: ignore[method-assign, assignment]
    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda *_, **__: None
    _align_parameter_groups()
    from megatron_aspo.tools.rehearsal import checkpoints
    from megatron_aspo.tools.rehearsal.engine import delta_net

    checkpoints.install()
    delta_net.install()


def _align_parameter_groups() -> None:
    """Give a pipeline stage without experts the empty group of parameters that it hears of from other stages."""
    import megatron.core.optimizer as mcore_optimizer

    own_groups = mcore_optimizer._get_param_groups

    def all_groups(chunks: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        groups, model = own_groups(chunks, *args, **kwargs), chunks[0].config
        apart = model.num_moe_experts and model.expert_model_parallel_size > 1
        if apart and not any(group["is_expert_parallel"] for group in groups):
            groups.append({**groups[0], "params": [], "is_expert_parallel": True})
        return groups

    mcore_optimizer._get_param_groups = all_groups


def _record_triton() -> None:
    """Let a Triton kernel's start be a note on the tape."""
    from triton.runtime.jit import KernelInterface

    def start(kernel: Any, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            if tape := _tape_now():
                tape.kernel("elementwise", 0.0, sum(map(bytes_touched, tensors_in((args, kwargs)))))

        return run

    KernelInterface.__getitem__ = start  # type: ignore[method-assign]


_real_tolist = torch.Tensor.tolist


def _tolist(tensor: Any) -> Any:
    """One copy of all values; torch would copy each value of a fake tensor."""
    shadow, tape = shadow_of(tensor), _tape_now()
    if tape and tensor is not shadow and tensor.device.type == "cuda":
        tape.sync(".tolist()")
    if tape and shadow is None:
        tape.guessed[code_line()] += 1
    with real():
        return _real_tolist(torch.ones(tensor.shape, dtype=tensor.dtype) if shadow is None else shadow)


def fake_files(path: str) -> int:
    """Let the folder of a config.json hold all tensors that transformers would write for it. Returns their number."""
    from megatron_aspo.policy.hf import bridge, weights

    shapes, source = weights.file_shapes(path), cast(Any, bridge._Weights)
    dtype = torch.bfloat16
    weights._stored_shapes = lambda _: shapes
    weights.gather_objects = lambda needed: [needed, set(shapes)]  # all roles together take every tensor: `files.check`
    source.get_all_keys = lambda _: sorted(shapes)

    def load_tensors(_: Any, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shapes[name], dtype=dtype) for name in names}

    source.load_tensors = load_tensors
    return len(shapes)


@contextlib.contextmanager
def fake_rank(rank: int, world: int, costs: Costs) -> Iterator[Tape]:
    """This process as one rank of `world`, with fake tensors and a tape."""
    from megatron_aspo.tools.rehearsal.phases import end_process

    dist.init_process_group("fake", rank=rank, world_size=world, store=dist.HashStore())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.autograd.set_multithreading_enabled(False), fake, Tape(fake, costs) as tape:
            _tapes.append(tape)
            yield tape
    finally:
        _tapes.clear()
        end_process()
        dist.destroy_process_group()


def rehearse(job: Job, costs: Costs) -> Trace:
    """Run one rank through a step, a save and a resume."""
    from megatron.core import parallel_state

    from megatron_aspo.tools.rehearsal.phases import Phases

    if job.config.model.hf_path:
        fake_files(job.config.model.hf_path)
    with tempfile.TemporaryDirectory() as folder, fake_rank(job.rank, job.world, costs) as tape:
        if job.meeting:
            tape.collectives.partner = Partner(job.meeting, job.rank)
        tape.skew = job.rank if job.routing == "unequal" else None
        phases = Phases(job, tape, Path(folder))
        phases.run()
        return Trace(
            rank=job.rank,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            micro_batches=phases.micro_batches,
            first_micro_batches=phases.first_micro_batches,
            phases=tape.device.phases,
            host=tape.host.phases,
            engine=phases.engine,
            events=tape.events,
            syncs=dict(tape.syncs),
            kernels=dict(tape.kernels),
            flops=dict(tape.flops),
            guessed=dict(tape.guessed),
            unordered=dict(tape.unordered),
            parameters=phases.parameters,
        )


def failed_layer(error: Exception) -> str:
    """Name in the model of the innermost layer whose forward pass raised the error; "" outside a model."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    layers = [layer for frame in frames if isinstance(layer := frame.f_locals.get("self"), torch.nn.Module)]
    names = {id(layer): name for name, layer in layers[0].named_modules()} if layers else {}
    return next((names[id(layer)] for layer in reversed(layers) if names.get(id(layer))), "")


def main() -> None:
    """Rehearse the pickled list of jobs on standard input, and pickle their traces into the file named."""
    jobs: list[Job] = pickle.load(sys.stdin.buffer)
    gpu = jobs[0].gpu
    install(gpu.capability, gpu.memory)
    failed = 0
    try:
        traces = [rehearse(job, Costs(gpu.flops, gpu.bandwidth)) for job in jobs]
        Path(sys.argv[1]).write_bytes(pickle.dumps(traces))
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        failed = 2
    except Exception as error:
        traceback.print_exc()
        if layer := failed_layer(error):
            print(f"{layer}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        failed = 1
    sys.stderr.flush()
    os._exit(failed)  # at Python's end torch asks its CUDA hooks again, whose answer was a Python function


if __name__ == "__main__":
    main()
