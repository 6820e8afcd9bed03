"""Phases of a rehearsed rank with known sizes: saving, resuming, offloaded optimizer states, reference weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rehearsals import DEMO, MARKS, ROOT, TINY

from megatron_aspo.config.load import load_config
from megatron_aspo.errors import RunError
from megatron_aspo.tools.planning.architectures import PUBLIC
from megatron_aspo.tools.planning.gpus import KNOWN
from megatron_aspo.tools.rehearsal import run
from megatron_aspo.tools.rehearsal.events import Trace

pytestmark = MARKS

SMALL_RUN = [*TINY, "train.release_gradients=true", "parallel.tensor=1", "rollout.engine=vllm"]
CASES = {
    "plain": [],
    "offload": ["optimizer.cpu_offload=1"],
    "reference": ["loss.kl_coef=0.1", "checkpoint.asynchronous=true"],
}
SMALL = 1 << 16
"""Bytes of norms, counters and lengths."""


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    """Rank 0 of two data-parallel ones in every case."""
    jobs = []
    for settings in CASES.values():
        config = load_config(DEMO, ["loss.kl_coef=0", *SMALL_RUN, *settings])
        jobs.append(run.Job(config, 0, 2, 128, 2, KNOWN["h100"]))
    return dict(zip(CASES, run.rehearse_jobs(jobs), strict=True))


def test_phases_in_their_order_and_the_engine_beside_them(traces: dict[str, Trace]) -> None:
    assert traces["reference"].engine == {
        "build": "",
        "engine start": "awake",
        "pack": "asleep",
        "old log-probs": "asleep",
        "reference log-probs": "asleep",
        "first update": "asleep",
        "update": "asleep",
        "release gradients": "asleep",
        "refit": "refit",
        "rollout": "awake",
        "checkpoint save": "asleep",
        "update beside the save": "asleep",
        "build to resume": "",
        "checkpoint load": "asleep",
        "update after resume": "asleep",
    }
    for trace in traces.values():
        assert list(trace.phases) == list(trace.engine) == list(trace.host)


def test_gradients_are_released_and_saving_takes_no_memory_of_the_device(traces: dict[str, Trace]) -> None:
    trace = traces["plain"]
    n = trace.parameters
    released, saved, loaded = (
        trace.phases[name] for name in ("release gradients", "checkpoint save", "checkpoint load")
    )
    assert released.start - released.end == pytest.approx(4 * n, abs=SMALL)
    assert saved.peak - saved.start <= SMALL
    assert saved.start == saved.end == trace.phases["rollout"].peak
    # A process that has made no pass yet lacks the products' workspace and the unused gradients.
    of_passes = ("transformer_engine/pytorch/cpp_extensions/gemm.py", "transformer_engine/pytorch/module/base.py")
    made = sum(size for line, size in saved.before.items() if line.startswith(of_passes))
    assert made > 32 << 20
    assert loaded.end == pytest.approx(saved.end - made, abs=SMALL)


def test_host_memory_of_a_save(traces: dict[str, Trace]) -> None:
    """Data-parallel rank 0 of two gathers three float32 states, and has a copy of each besides that it writes."""
    trace = traces["plain"]
    n, host = trace.parameters, trace.host["checkpoint save"]
    assert trace.host["update"].peak <= SMALL * 4
    # All states (12), those of this rank (6), and of the state in progress both ranks' parts and these joined (4 + 4),
    # while the last one's parts are alive (4).
    assert host.peak == pytest.approx(30 * n, rel=0.02)
    assert 2 * n < host.end < 4 * n  # pinned copies of the weights in torch's cache, rounded up to powers of two


def test_host_memory_beside_an_asynchronous_save(traces: dict[str, Trace]) -> None:
    """The copies that are written, of float32 states and 16-bit weights, stay until the checkpoint is published."""
    trace = traces["reference"]
    n, host = trace.parameters, trace.host
    assert host["checkpoint save"].peak - host["checkpoint save"].start == pytest.approx(30 * n, rel=0.02)
    assert host["update beside the save"].start - host["checkpoint save"].start == pytest.approx(14 * n, rel=0.02)


def test_a_resumed_rank_keeps_what_it_had_before(traces: dict[str, Trace]) -> None:
    for trace in traces.values():
        for memory in (trace.phases, trace.host):
            before, after = memory["update"], memory["update after resume"]
            cached = max(phase.kept.get("torch's cache of freed pinned memory", 0) for phase in memory.values())
            assert after.end - cached == pytest.approx(before.end, rel=0.02, abs=1 << 20)


def test_offloaded_states_are_on_the_host(traces: dict[str, Trace]) -> None:
    plain, offloaded = (traces[name] for name in ("plain", "offload"))
    n = plain.parameters
    # Half of the parameters are this rank's: float32 weights and two moments.
    assert plain.phases["rollout"].end - offloaded.phases["rollout"].end == pytest.approx(6 * n, rel=0.02)
    assert 8 * n < offloaded.host["update"].end < 10 * n  # with a gradient, pinned


def test_reference_weights_are_pinned(traces: dict[str, Trace]) -> None:
    n = traces["plain"].parameters
    assert 2 * n < traces["reference"].host["build"].end < 4 * n


def test_a_product_that_fp8_cannot_take_names_its_layer(tmp_path: Path) -> None:
    fields = PUBLIC["deepseek-ai/DeepSeek-V3"] | {"num_hidden_layers": 5, "kv_lora_rank": 504, "hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = ["parallel.pipeline=2", "fp8.recipe=current", f"model.hf_path={tmp_path}"]
    config = load_config(str(ROOT / "examples/deepseek_v3_671b.yaml"), settings)
    with pytest.raises(RunError, match=r"layers\.0\.self_attention\.linear_kv_down_proj: .* FP8 "):
        run.rehearse_jobs([run.Job(config, 0, 256, fields["vocab_size"], 2, KNOWN["h100"])])
