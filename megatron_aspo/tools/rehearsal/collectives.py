"""Collectives and messages on fake tensors: each becomes an event. Integers travel; ranks that do not run are
taken to have this one's."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aspo.tools.rehearsal.events import Event, code_line
from megatron_aspo.tools.rehearsal.fake_gpu import FakeWork, ProcessGroup
from megatron_aspo.tools.rehearsal.lockstep import Partner
from megatron_aspo.tools.rehearsal.shadows import forget, overwrite, real, shadow_of, tensors_in

if TYPE_CHECKING:
    from megatron_aspo.tools.rehearsal.tape import Tape

_c10d = torch.ops.c10d
_OUTPUT_FIRST = {
    _c10d._allgather_base_.default,
    _c10d.allgather_.default,
    _c10d._reduce_scatter_base_.default,
    _c10d.reduce_scatter_.default,
    _c10d.alltoall_base_.default,
    _c10d.alltoall_.default,
    _c10d.gather_.default,
    _c10d.scatter_.default,
    _c10d.allgather_into_tensor_coalesced_.default,
    _c10d.reduce_scatter_tensor_coalesced_.default,
}
_REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")


class Collectives:
    """The c10d operators of one tape."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._works = 0
        self.partner: Partner | None = None
        self.batch = -1
        self.reduction = "SUM"  # of the call in progress: the operator hides it

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write the event down and return what the operator does."""
        self._tape.flush()
        name = func.overloadpacket._qualified_op_name.removeprefix("c10d::").strip("_")
        group = next(ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
        options = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
        outputs = list(tensors_in(args[0]))
        inputs = list(tensors_in(args[1])) if func in _OUTPUT_FIRST else outputs
        ranks = tuple(dist.get_process_group_ranks(group))
        event = Event(
            name,
            group.group_name,
            ranks,
            sent=sum(tensor.nbytes for tensor in inputs) if name != "recv" else 0,
            received=sum(tensor.nbytes for tensor in outputs) if name != "send" else 0,
            dtype=str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
            asynchronous=bool(options.get("async_op", True)),
            phase=self._tape.current,
            line=code_line(),
        )
        if name in ("send", "recv"):
            event.peer, event.batch = ranks[args[2]], self.batch
        elif name in ("broadcast", "reduce"):
            event.peer = ranks[options["root_rank"]]
        if "output_split_sizes" in options:
            event.splits = tuple(options["output_split_sizes"]), tuple(options["input_split_sizes"])
        elif "reduce_op" in options:
            event.detail = self.reduction
        if any(tensor.device.type == "cpu" for tensor in outputs):
            event.detail += " cpu"
        _carry_values(event, inputs, outputs, self._meet(event, inputs))
        self._works += 1
        event.work = self._works
        self._tape.events.append(event)
        work = FakeWork()
        work.seq_id = event.work
        return work.boxed() if len(func._schema.returns) == 1 else (args[0], work.boxed())

    def _meet(self, event: Event, inputs: list[Tensor]) -> dict[int, Any]:
        """The shadows of the running ranks' inputs, by rank."""
        if self.partner is None or event.kind in ("send", "recv"):
            return {}
        shadows = [shadow_of(tensor) for tensor in inputs]
        receives = event.kind == "broadcast" and event.peer != dist.get_rank()
        wait = event.kind in _CARRIED and (receives or all(shadow is not None for shadow in shadows))
        with real():
            answers = self.partner.post(
                event, pickle.dumps([_pack(shadow) for shadow in shadows] if wait else []), wait
            )
            return {rank: [_unpack(*one) for one in pickle.loads(answer)] for rank, answer in answers.items()}

    def objects(self, name: str, group: Any) -> None:
        """Note a collective of pickled objects, which waits for the device."""
        group = group or dist.group.WORLD
        self._tape.flush()
        self._tape.sync(name)
        ranks = tuple(dist.get_process_group_ranks(group))
        self._tape.events.append(Event(name, group.group_name, ranks, phase=self._tape.current, line=code_line()))

    def waited(self, work: int) -> None:
        self._tape.flush()
        self._tape.events.append(Event("wait", work=work, phase=self._tape.current))


def install(tape_now: Any) -> None:
    """Route torch.distributed of this process to the collectives of `tape_now()`, which may be None."""

    def all_gather_object(everyones: list[Any], mine: Any, group: Any = None) -> None:
        if tape := tape_now():
            tape.collectives.objects("all_gather_object", group)
        everyones[:] = [mine] * len(everyones)

    def gather_object(obj: Any, everyones: Any = None, *_: Any, group: Any = None, **named: Any) -> None:
        if tape := tape_now():
            tape.collectives.objects("gather_object", group)
        if everyones := named.get("object_gather_list", everyones):
            everyones[:] = [obj] * len(everyones)

    def broadcast_object_list(objects: Any, src: Any = None, group: Any = None, *_: Any, **options: Any) -> None:
        if tape := tape_now():
            tape.collectives.objects("broadcast_object_list", group)

    def batch_isend_irecv(operations: Sequence[Any]) -> list[Any]:
        nonlocal batches
        collectives = tape_now().collectives
        batches += 1
        collectives.batch = batches
        try:
            return [_start_message(operation) for operation in operations]
        finally:
            collectives.batch = -1

    def wait(self: Any, timeout: Any = None) -> bool:
        if tape := tape_now():
            tape.collectives.waited(self.seq_id)
        return True

    def named(function: Any) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tape = tape_now()
            if tape is None:
                return function(*args, **kwargs)
            op = signature.bind(*args, **kwargs).arguments.get("op", dist.ReduceOp.SUM)
            names = [name for name in ("SUM", "AVG", "MAX", "MIN", "PRODUCT") if op == getattr(dist.ReduceOp, name)]
            tape.collectives.reduction = names[0] if names else "?"
            try:
                return function(*args, **kwargs)
            finally:
                tape.collectives.reduction = "SUM"

        return call

    batches = 0
    new_group = dist.new_group
    dist.all_gather_object = all_gather_object
    dist.gather_object = gather_object
    dist.broadcast_object_list = broadcast_object_list
    dist.batch_isend_irecv = batch_isend_irecv
    dist.new_group = lambda ranks=None, **options: new_group(ranks, group_desc=options.get("group_desc"))
    for name in _REDUCTIONS:
        setattr(dist, name, named(getattr(dist, name)))
    FakeWork.wait = wait


def _start_message(operation: Any) -> Any:
    peer = "group_dst" if "send" in operation.op.__name__ else "group_src"
    return operation.op(operation.tensor, group=operation.group, tag=operation.tag, **{peer: operation.group_peer})


def _pack(shadow: Tensor | None) -> tuple[Any, ...]:
    """For a message; torch.load would make fake tensors."""
    return (
        () if shadow is None else (shadow.shape, shadow.dtype, bytearray(shadow.reshape(-1).view(torch.uint8).numpy()))
    )


def _unpack(shape: Any = None, dtype: Any = None, data: bytearray | None = None) -> Tensor | None:
    if data is None:
        return None
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _carry_values(
    event: Event, inputs: list[Tensor], outputs: list[Tensor], others: Mapping[int, Any] = MappingProxyType({})
) -> None:
    """Give the outputs shadows.

    Args:
        others: rank -> shadows of its inputs; a rank that is not there has this rank's own.
    """
    mine = [shadow_of(tensor) for tensor in inputs]
    everyones = [others.get(rank, mine) for rank in event.ranks]
    for i, out in enumerate(outputs):
        parts: list[Any]
        if event.kind == "broadcast":
            parts = others.get(event.peer, mine)[i : i + 1] or [None]
        elif event.kind == "allgather":
            parts = everyones[i][:1] if len(outputs) == len(everyones) else []
            parts = parts or [None]
        else:
            parts = [one[i] if i < len(one) else None for one in everyones]
        if event.kind not in _CARRIED or any(part is None for part in parts):
            forget(out)
            continue
        with real():
            if event.kind == "allreduce":
                values = _REDUCE.get(event.detail.split(" ")[0], _same)(torch.stack(parts))
            else:
                values = torch.cat(parts) if len(parts) > 1 else parts[0]
            overwrite(out, values.view(out.shape).clone())


_CARRIED = ("allreduce", "allgather", "allgather_base", "broadcast")
_REDUCE: dict[str, Any] = {
    "SUM": lambda parts: parts.sum(0, dtype=parts.dtype),
    "MAX": lambda parts: parts.amax(0),
    "MIN": lambda parts: parts.amin(0),
}


def _same(parts: Tensor) -> Tensor:
    return parts[0]


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and value._type().qualified_name().endswith("ProcessGroup")
