"""Ranks that do not find each other: a line says where they looked and what to do."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
from ranks import run, run_config

from megatron_aspo import distributed as distributed_module
from megatron_aspo.config import ParallelConfig
from megatron_aspo.distributed import distributed
from megatron_aspo.errors import RunError

pytestmark = pytest.mark.distributed


def start_alone(take_port: bool) -> str:
    """What the first of two ranks says when there is no second one, or when its port belongs to another program."""
    os.environ["WORLD_SIZE"] = "2"
    distributed_module.TIMEOUT = timedelta(seconds=5)
    with socket.socket() as other:
        if take_port:
            other.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
            other.listen()
        try:
            with distributed(run_config(ParallelConfig(tensor=2))):
                return "came together"
        except RunError as error:
            return str(error)


@pytest.mark.parametrize(("take_port", "cause"), [(False, "1/2 clients joined"), (True, "address already in use")])
def test_ranks_that_do_not_find_each_other(take_port: bool, cause: str) -> None:
    (told,) = run(1, start_alone, take_port)
    assert told.startswith("the 2 ranks did not find each other at MASTER_ADDR:MASTER_PORT = 127.0.0.1:")
    assert cause in told
    assert told.endswith("start all of them with the same two, on a port that is free and that the other nodes reach")
