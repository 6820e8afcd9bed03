"""The private functions of torch that a rehearsal takes: each test names one that changed when torch moves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_aspo.tools.rehearsal.fake_gpu import FakeMaker, FakeTensorMode, FakeWork, no_dispatch
from megatron_aspo.tools.rehearsal.tape import Tape

BACKWARD = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_aspo.tools.rehearsal import fake_gpu

waits = []
fake_gpu.pretend(waits.append, (9, 0), 80 << 30)
with torch.autograd.set_multithreading_enabled(False), FakeTensorMode():
    x = torch.nn.Linear(4, 3).cuda()
    assert x.weight.device.type == "cuda", x.weight.device
    y = x(torch.ones(2, 4, device="cuda")).sum()
    y.backward()
    assert x.weight.grad.shape == (3, 4) and x.weight.grad.device.type == "cuda"
torch.cuda.synchronize()
print(waits, torch.cuda.get_device_capability(), flush=True)
import os; os._exit(0)
"""


def test_backward_over_fake_cuda_tensors() -> None:
    """Broken: the place of `hasPrimaryContext` in the table of CUDA's hooks (`fake_gpu._HAS_PRIMARY_CONTEXT`)."""
    done = subprocess.run([sys.executable, "-c", BACKWARD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "['torch.cuda.synchronize'] (9, 0)"


@pytest.mark.parametrize("name", ["_ensureCUDADeviceGuardSet", "_set_only_lift_cpu_tensors"])
def test_functions_of_torch_c(name: str) -> None:
    assert callable(getattr(torch._C, name))


def test_a_fake_work_has_a_number_and_can_be_boxed() -> None:
    """`collectives` numbers the handles of asynchronous collectives, so that waits find them."""
    work = FakeWork()
    work.seq_id = 7
    assert work.seq_id == 7
    assert isinstance(work.boxed(), torch.ScriptObject)


def test_a_fake_tensor_is_made_as_by_torch() -> None:
    """Broken: the attributes that `FakeTensor.__new__` gives, which `FakeMaker` copies, or `Tensor._make_subclass`."""
    with FakeTensorMode() as mode:
        theirs = torch.empty(4, 6, dtype=torch.bfloat16, device="cuda")
        view = theirs[1:, ::2]
        made = FakeMaker(mode).new((4, 6), (6, 1), torch.bfloat16, theirs.device)
        other = FakeMaker(mode).view(made, view.shape, view.stride(), view.storage_offset(), view.dtype, view.device)
        for one, same in ((theirs, made), (view, other)):
            assert vars(one) == vars(same)
            assert (one.shape, one.stride(), one.dtype, one.device) == (
                same.shape,
                same.stride(),
                same.dtype,
                same.device,
            )
        assert made.untyped_storage()._cdata == other.untyped_storage()._cdata
        assert made.untyped_storage().nbytes() == theirs.untyped_storage().nbytes() == 48
        assert (made + 1).device.type == "cuda"


def test_operators_pass_by_all_modes() -> None:
    """Broken: `torch._C._DisableTorchDispatch`, in which shadows are computed."""
    with FakeTensorMode(), no_dispatch():
        assert torch.ones(3).sum().item() == 3


def test_a_tape_is_called_without_the_compiler() -> None:
    """Broken: `TorchDispatchMode._should_skip_dynamo`; each operator would pass through torch._dynamo."""
    assert Tape.__torch_dispatch__.__module__ == Tape.__module__
    assert not hasattr(Tape.__torch_dispatch__, "__wrapped__")


def test_a_device_is_asked_by_an_operator() -> None:
    """Broken: torch's question for a tensor's device, which the tape answers (`route` "ask")."""
    assert torch.ops.prim.device.default.namespace == "prim"
