"""Faults put back into the code, one at a time, and the lines by which a rehearsal finds them.

`python planted_faults.py FILE [NAMES]` rehearses all of them in one process and writes name -> lines to FILE.
"""

from __future__ import annotations
import __future__

import contextlib
import gc
import importlib
import inspect
import json
import os
import sys
import textwrap
import traceback
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rehearsals import EXPERTS as MOE
from rehearsals import ROOT
from rehearsals import TINY as SMALL

TINY = (*SMALL, "model.num_layers=1", "loss.kl_coef=0", "train.max_tokens_per_micro_batch=256")
TENSOR = ("parallel.tensor=2", "parallel.sequence_parallel=true")
STAGES = ("parallel.tensor=1", "parallel.pipeline=2", "model.num_layers=2")
RECOMPUTED = ("parallel.tensor=1", "train.recompute=full")
EXPERTS = (*RECOMPUTED, *MOE)
FP8 = ("parallel.tensor=2", "rollout.engine=vllm", "fp8.recipe=blockwise")
VLLM = ("parallel.tensor=1", "rollout.engine=vllm", "rollout.refit_checksum=true", "rollout.kv_cache_gb=1")

VOCABULARY = 32768
MARGIN = 1 << 16
"""Bytes that are left in a full GPU."""

POLICY = "megatron_aspo.policy.trainer:Policy"


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        code: module and name of the function that is changed.
        edits: texts of its source, and what takes their place.
        finding: regular expression of the line that names the cause.
        ranks: that are rehearsed.
        on: the rank with the fault; None: all of them.
        full: phase; the GPU is hardly larger than what this phase needs without the fault.
        saving, resume: also write the checkpoint, and load it.
        edited: another function and its edit.
    """

    code: str
    edits: list[tuple[str, str]]
    finding: str
    settings: tuple[str, ...] = TENSOR
    ranks: tuple[int, ...] = (0,)
    on: int | None = None
    full: str = ""
    saving: bool = False
    resume: bool = False
    edited: dict[str, tuple[str, str]] = field(default_factory=dict)


PAIR: dict[str, Any] = {"ranks": (0, 1), "on": 1}
STAGE: dict[str, Any] = {"settings": STAGES, "ranks": (0, 2), "on": 2}

DISPATCHERS = "vars(dispatcher).update(dict.fromkeys(_LAST_PASS & vars(dispatcher).keys()))"
WEIGHT = "    weight = _weight(output_layer, output_weight, config)\n    output ="
NEXT = "        batch = next(batches)\n"
REDUCE = "dist.all_reduce(norm)"
CHUNKS = ("sequence_parallel, chunk_size, temperature", "sequence_parallel, {}, temperature")
STEPPED = "        self.scheduler.step(1)\n"
COPY = "        self.copies = [*getattr(self, 'copies', []), self.model.buffers[0].grad_data.clone()]\n"


def chunks(size: int) -> tuple[str, str]:
    return CHUNKS[0], CHUNKS[1].format(size)


FAULTS = {
    # Memory that stays
    "the graph behind a dispatcher's probabilities": Fault(
        f"{POLICY}._forward_backward", [(DISPATCHERS, "pass")], "rank 0, first update: .* stay .*", EXPERTS
    ),
    "the last input of a stage": Fault(
        f"{POLICY}._forward_backward",
        [("block.input_tensor = None", "pass")],
        "rank 2, first update: .* stay .* from megatron/core/pipeline_parallel/",
        **STAGE,
    ),
    "hidden states until the next update": Fault(
        "megatron_aspo.loss.megatron:megatron_loss_head",
        [(WEIGHT, "    megatron_loss_head.last = hidden_states\n" + WEIGHT)],
        "rank 0, first update: .* stay .* from transformer_engine/pytorch/.*norm",
    ),
    "a copy of the gradients in every update": Fault(
        f"{POLICY}.train_step",
        [(STEPPED, STEPPED + COPY)],
        "rank 0, update: .* stay .* from megatron_aspo/policy/trainer.py",
    ),
    "gradients that are not released": Fault(
        f"{POLICY}.release_gradients",
        [("if self.config.train.release_gradients", "if False")],
        "releasing the gradients frees nothing",
        (*RECOMPUTED, "train.release_gradients=true"),
    ),
    "copies of what a refit sends": Fault(
        "megatron_aspo.rollout.weight_sync:transfer",
        [("        load(bucket)\n", "        load(bucket)\n        transfer.last = [t.clone() for _, t in bucket]\n")],
        "rank 0, refit: .* stay",
        VLLM,
    ),
    # Memory that does not fit
    "a checkpoint that gathers whole float32 buffers on the GPU": Fault(
        "megatron_aspo.policy.checkpoint:_sharded_state",
        [("metadata=_OPTIMIZER_FORMAT", "metadata={**_OPTIMIZER_FORMAT, [*_OPTIMIZER_FORMAT][1]: False}")],
        "checkpoint save: .* do not fit .* from megatron/core/optimizer/distrib_optimizer.py",
        RECOMPUTED,
        full="checkpoint save",
        saving=True,
    ),
    "a checksum of whole tensors": Fault(
        "megatron_aspo.rollout.weight_sync:checksum",
        [("len(bits), _SLICE", "len(bits), 1 << 40"), ("bits.split(_SLICE)", "bits.split(1 << 40)")],
        "refit: .* do not fit .* from megatron_aspo/rollout/weight_sync.py",
        VLLM,
        full="refit",
    ),
    "the logits of all tokens at once": Fault(
        "megatron_aspo.loss.fused_linear:fused_linear_policy_loss",
        [chunks(1 << 20)],
        "update: .* do not fit .* from megatron_aspo/loss/",
        (*RECOMPUTED, "train.max_tokens_per_micro_batch=4096"),
        full="update",
    ),
    "vLLM awake while a checkpoint is written": Fault(
        "megatron_aspo.tools.rehearsal.phases:Phases.run",
        [('self._phase("checkpoint save", ASLEEP)', 'self._phase("checkpoint save", AWAKE)')],
        "checkpoint save: .* do not fit .* 1.00 from KV cache",
        VLLM,
        full="checkpoint save",
        saving=True,
    ),
    # Waits and order
    "an .item() in the loss head": Fault(
        "megatron_aspo.loss.megatron:megatron_loss_head",
        [(WEIGHT, "    hidden_states.norm().item()\n" + WEIGHT)],
        "rank 0, update: the host waits for the device 2 times at megatron_aspo/loss/megatron.py",
    ),
    "positions of the counted tokens from the mask": Fault(
        f"{POLICY}._head_arguments",
        [("batch.loss_positions", "None")],
        "the host waits for the device .* at megatron_aspo/loss/validation.py",
    ),
    "a wait per micro-batch in the trainer": Fault(
        f"{POLICY}._loss_step",
        [(NEXT, NEXT + "        batch.tokens.sum().item()\n")],
        "the host waits for the device .* at megatron_aspo/policy/trainer.py",
    ),
    "rotary embedding by a loop over segments": Fault(
        "megatron_aspo.policy.rotary:apply_rotary_thd",
        [("len(t), cp_group.rank()", "cu_seqlens.tolist() and len(t), cp_group.rank()")],
        "the host waits for the device .* at megatron_aspo/policy/rotary.py",
        edited={
            "megatron_aspo.policy.model:transformer_config": ("with_engine and kind is TransformerConfig", "False")
        },
    ),
    "experts' outputs summed in any order": Fault(
        "megatron_aspo.policy.model:_expert_settings",
        [('"moe_permute_fusion": with_engine', '"moe_permute_fusion": False')],
        "log-probs: scatter_add_ sums in any order .* at megatron/core/transformer/moe/moe_utils.py",
        EXPERTS,
    ),
    # Collectives and messages
    "a collective that a rank leaves out": Fault(
        f"{POLICY}._gradients_are_finite",
        [(REDUCE, "pass")],
        "differ at call .* rank 0: allreduce .* megatron_aspo/policy/trainer.py",
        **PAIR,
    ),
    "a collective of another size": Fault(
        f"{POLICY}._gradients_are_finite",
        [(REDUCE, "dist.all_reduce(norm.expand(2).contiguous())")],
        "rank 1: allreduce SUM of 8 bytes .* megatron_aspo/policy/trainer.py",
        **PAIR,
    ),
    "a collective of another type": Fault(
        f"{POLICY}._gradients_are_finite",
        [(REDUCE, "dist.all_reduce(norm.double())")],
        "rank 1: allreduce SUM of 8 bytes float64 .* megatron_aspo/policy/trainer.py",
        **PAIR,
    ),
    "another reduction": Fault(
        f"{POLICY}._gradients_are_finite",
        [(REDUCE, "dist.all_reduce(norm, op=dist.ReduceOp.MAX)")],
        "rank 1: allreduce MAX of 4 bytes .* megatron_aspo/policy/trainer.py",
        **PAIR,
    ),
    "a collective of rank 0 alone": Fault(
        f"{POLICY}._gradients_are_finite",
        [(REDUCE, "if dist.get_rank() == 0:\n            dist.all_reduce(norm)")],
        "differ at call .* rank 0: allreduce .* megatron_aspo/policy/trainer.py",
        ranks=(0, 1),
    ),
    "two collectives of a group in another order": Fault(
        f"{POLICY}._logprobs_step",
        [(NEXT, NEXT + "        dist.all_reduce(batch.loss_mask.float(), group=self.tp_group)\n")],
        "differ at call .* rank 1: allreduce .* old log-probs, megatron_aspo/policy/trainer.py",
        **PAIR,
    ),
    "collectives of two groups in another order": Fault(
        f"{POLICY}.train_step",
        [
            ("        if not self._grad", "        stepped = self.optimizer.step()\n        if not self._grad"),
            ("_, grad_norm, _ = self.optimizer.step()", "_, grad_norm, _ = stepped"),
        ],
        "rank 1: .* megatron_aspo/policy/trainer.py",
        **PAIR,
    ),
    "another chunk size on one rank": Fault(
        "megatron_aspo.loss.fused_linear:fused_linear_policy_loss",
        [chunks(100)],
        "rank 1: allgather_base .* megatron_aspo/loss/collectives.py",
        **PAIR,
    ),
    "a message of another size": Fault(
        "megatron.core.pipeline_parallel.p2p_communication:_batched_p2p_ops",
        [("isend, tensor_send_prev", "isend, tensor_send_prev.float()")],
        "wait for each other.* rank 2: send .* float32 .* megatron/core/pipeline_parallel/p2p_communication.py",
        **STAGE,
    ),
    "a message that is not sent": Fault(
        "megatron.core.pipeline_parallel.p2p_communication:_batched_p2p_ops",
        [("if tensor_send_prev is not None:", "if False:")],
        "wait for each other.*rank 0: recv .* megatron/core/pipeline_parallel/p2p_communication.py",
        **STAGE,
    ),
    # Kernels
    "a tensor of the host handed to attention": Fault(
        "megatron_aspo.policy.model:model_inputs",
        [("cu_seqlens_q=batch.cu_seqlens,", "cu_seqlens_q=batch.cu_seqlens.cpu(),")],
        r"RuntimeError: .* gets a tensor \[3\] of the host, at transformer_engine/.* < megatron_aspo/",
    ),
    "a norm's weight of the host": Fault(
        "transformer_engine.pytorch.ops.basic.rmsnorm:RMSNorm.op_forward",
        [("self.weight, dtype).view((inner_dim,))", "self.weight, dtype).view((inner_dim,)).cpu()")],
        r"RuntimeError: rmsnorm_fwd gets a tensor \[256\] of the host, at transformer_engine/.* < megatron_aspo/",
    ),
    "tokens that are no multiple of FP8's": Fault(
        "megatron_aspo.config.run:RunConfig.stream_multiple",
        [("ranks * self.fp8.multiple", "ranks")],
        "both sides must be multiples of 16",
        (*FP8, "model.max_sequence_length=116"),
    ),
    # Resuming
    "scales of delayed FP8 that are not unpickled": Fault(
        "megatron_aspo.policy.checkpoint:_load_sharded",
        [('os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"', "pass")],
        "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE",
        ("parallel.tensor=2", "rollout.engine=vllm", "fp8.recipe=delayed"),
        resume=True,
    ),
    "moments in bfloat16 beside remainders": Fault(
        "megatron_aspo.policy.optimizer:offload_settings",
        [('"store_param_remainders": False', '"store_param_remainders": True')],
        "fused_adam",
        ("parallel.tensor=1", "optimizer.moments_dtype=bfloat16"),
        resume=True,
    ),
}


@contextlib.contextmanager
def edited(code: str, edits: list[tuple[str, str]]) -> Iterator[None]:
    """Give a function the code of its changed source, at the same lines of the same file."""
    module, _, names = code.partition(":")
    function: Any = importlib.import_module(module)
    for name in names.split("."):
        function = getattr(function, name)
    function = inspect.unwrap(getattr(function, "fget", function))
    lines, first = inspect.getsourcelines(function)
    source = "".join(lines)
    for old, new in edits:
        assert source.count(old) == 1, f"{code} has {old!r} {source.count(old)} times"
        source = source.replace(old, new)
    scope: dict[str, Any] = {}
    text, flags = "\n" * (first - 1) + textwrap.dedent(source), __future__.annotations.compiler_flag
    exec(
        compile(text, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True),
        vars(sys.modules[module]),
        scope,
    )
    made: Any = scope[function.__name__]
    before, function.__code__ = function.__code__, inspect.unwrap(getattr(made, "fget", made)).__code__
    try:
        yield
    finally:
        function.__code__ = before


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for code, edits in {fault.code: fault.edits, **{code: [edit] for code, edit in fault.edited.items()}}.items():
            stack.enter_context(edited(code, edits))
        yield


def tiny_plan(settings: tuple[str, ...]) -> Any:
    from megatron_aspo.config.load import load_config
    from megatron_aspo.tools.planning.plan import make_plan

    config = load_config(str(ROOT / "examples/demo_chain_sum.yaml"), [*TINY, *settings])
    return make_plan(config, 2 * config.parallel.model_parallel_size, vocab_size=VOCABULARY)


def traces_of(plan: Any, ranks: tuple[int, ...], resume: bool, saving: bool = False) -> dict[int, Any]:
    from megatron_aspo.tools.rehearsal.costs import Costs
    from megatron_aspo.tools.rehearsal.rank import rehearse
    from megatron_aspo.tools.rehearsal.run import Job

    os.environ.pop("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", None)  # set by an earlier run
    costs = Costs(plan.gpu.flops, plan.gpu.bandwidth)
    count = 2 * plan.config.parallel.pipeline
    jobs = [Job(plan.config, rank, plan.world, plan.shape.vocab_size, count, plan.gpu, resume=resume) for rank in ranks]
    unsaved = unittest.mock.patch("megatron_aspo.policy.checkpoint.Saver.save")
    with contextlib.nullcontext() if resume or saving else unsaved:
        return {job.rank: rehearse(job, costs) for job in jobs}


def main() -> None:
    from megatron_aspo.tools.rehearsal.findings import find
    from megatron_aspo.tools.rehearsal.memory import all_needs
    from megatron_aspo.tools.rehearsal.rank import install

    gpu = tiny_plan(TENSOR).gpu
    install(gpu.capability, gpu.memory)
    gc.freeze()  # a tape collects cycles between phases
    healthy: dict[Any, dict[int, Any]] = {}
    lines: dict[str, list[str]] = {}
    for name, fault in FAULTS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        started = os.times().user
        try:
            plan, key = tiny_plan(fault.settings), (fault.settings, fault.ranks, fault.saving, fault.resume)
            sound = healthy[key] = healthy.get(key) or traces_of(plan, fault.ranks, fault.resume, fault.saving)
            assert (found := find(list(sound.values()), plan)) == [], found
            if fault.full:
                needed = max(need.device for need in all_needs(list(sound.values()), plan) if need.phase == fault.full)
                plan = replace(plan, gpu=replace(plan.gpu, memory=int((needed + MARGIN) / 0.97)))
                assert not any(f" {fault.full}: " in line for line in find(list(sound.values()), plan))
            faulty = fault.ranks if fault.on is None else (fault.on,)
            with planted(fault):
                lines[name] = find(list((sound | traces_of(plan, faulty, fault.resume, fault.saving)).values()), plan)
        except Exception as error:
            lines[name] = [f"{type(error).__name__}: {error}", traceback.format_exc()]
        gc.collect()
        gc.freeze()
        print(f"{os.times().user - started:5.1f} s  {name}: {lines[name]}", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(json.dumps(lines))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
