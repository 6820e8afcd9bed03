"""If ranks cannot reach each other, each ends with one line that names the address and the cause."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
from ranks import run, run_config

from megatron_aspo.config.model import ParallelConfig
from megatron_aspo.errors import RunError
from megatron_aspo.ranks import process_group

pytestmark = pytest.mark.distributed


def start_alone(take_port: bool) -> str:
    """The error of the first of two ranks if the second is missing, or if another program holds its port."""
    os.environ["WORLD_SIZE"] = "2"
    process_group.TIMEOUT = timedelta(seconds=5)
    with socket.socket() as other:
        if take_port:
            other.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
            other.listen()
        with (
            pytest.raises(RunError) as error,
            process_group.distributed(run_config(ParallelConfig(tensor=2))),
        ):
            pass
    return str(error.value)


@pytest.mark.parametrize(("take_port", "cause"), [(False, "1/2 clients joined"), (True, "address already in use")])
def test_ranks_that_do_not_find_each_other(take_port: bool, cause: str) -> None:
    (message,) = run(1, start_alone, take_port)
    assert "MASTER_ADDR:MASTER_PORT = 127.0.0.1:" in message
    assert cause in message
