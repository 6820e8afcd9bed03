"""Checks that misbehave, for `test_gpu_check`."""

import json
import math
import os
import signal
import subprocess
import sys
import time

from megatron_aspo.errors import UserError
from megatron_aspo.tools.gpu_check.records import Lab, Numbers


def passes(lab: Lab) -> Numbers:
    print("[1, 2] is no result")
    return {"error": 0.5, "gpus": float(os.environ["CUDA_VISIBLE_DEVICES"] or -1)}


def raises(lab: Lab) -> Numbers:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def refuses(lab: Lab) -> Numbers:
    raise UserError("no model here")


def hangs(lab: Lab) -> Numbers:
    """Hangs, as does its own child, which ignores SIGTERM."""
    child = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    (lab.path / "child").write_text(str(subprocess.Popen(child).pid))
    time.sleep(600)
    return {}


def exits(lab: Lab) -> Numbers:
    os._exit(3)


def leaves(lab: Lab) -> Numbers:
    """Ends well before it has returned anything."""
    os._exit(0)


def is_killed(lab: Lab) -> Numbers:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def has_nan(lab: Lab) -> Numbers:
    return {"error": math.nan}


def misses(lab: Lab) -> Numbers:
    return {"ok": 1.0}


def exceeds(lab: Lab) -> Numbers:
    return {"error": 2.0}


def is_no_table(lab: Lab) -> object:
    return json.dumps({"error": 0.5})


def holds_words(lab: Lab) -> object:
    return {"error": "none"}


def cannot_be_written(lab: Lab) -> object:
    return {"error": object()}


def sleeps(lab: Lab) -> Numbers:
    time.sleep(2)
    return {"error": 0.0}
