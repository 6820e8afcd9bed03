"""Rehearses the pickled jobs on standard input as if device and host had one memory and nothing were fused, and prints
the pickled phases."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from typing import Any

from megatron_aspo.tools.rehearsal import rank
from megatron_aspo.tools.rehearsal.costs import Costs
from megatron_aspo.tools.rehearsal.engine import load
from megatron_aspo.tools.rehearsal.ledger import Ledger
from megatron_aspo.tools.rehearsal.run import Job
from megatron_aspo.tools.rehearsal.tape import Tape


def main() -> None:
    jobs: list[Job] = pickle.load(sys.stdin.buffer)
    gpu = jobs[0].gpu
    load.fuse = lambda function: function  # a CPU runs compiled functions operator by operator
    rank.install(gpu.capability, gpu.memory)
    os.environ["MEGATRON_ASPO_KERNELS"] = "torch"  # as on a CPU
    gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.get_cublas_workspace_size_bytes = lambda: 0
    start: Any = Tape.__init__

    def with_one_memory(tape: Any, *args: Any) -> None:
        start(tape, *args)
        tape.host = tape.device

    setattr(Tape, "__init__", with_one_memory)  # noqa: B010
    for name in ("pin", "unpin"):  # a copy to the host without a wait is the tensor itself on a CPU
        setattr(Ledger, name, lambda self, line, size: None)
    traces = [rank.rehearse(job, Costs(gpu.flops, gpu.bandwidth)) for job in jobs]
    phases = [{name: (memory.peak, memory.end) for name, memory in trace.phases.items()} for trace in traces]
    sys.stdout.buffer.write(b"\n" + pickle.dumps(phases))
    sys.stdout.flush()
    os._exit(0)


main()
