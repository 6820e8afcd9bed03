"""Write the table of docs/lab/scale-plane.md: `python benchmarks/scale_plane.py`. It takes seconds and no GPU."""

from __future__ import annotations

from pathlib import Path

from megatron_aspo.config.load import load_config
from megatron_aspo.tools.planning.engine import engine_parameters
from megatron_aspo.tools.planning.plan import Plan, make_plan
from megatron_aspo.tools.planning.traffic import Traffic, traffic

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/lab/scale-plane.md"
MARKERS = "<!-- python benchmarks/scale_plane.py -->\n", "<!-- end -->\n"

LONG = ("model.max_sequence_length=10240", "rollout.max_response_tokens=8192", "train.max_tokens_per_micro_batch=10240")
CASES = {
    "qwen3_32b_async": (64, ()),
    "qwen3_235b_a22b_async": (256, ()),
    "deepseek_v3_671b": (512, (*LONG, "rollout.max_staleness=1")),
}
"""Recipe -> its GPUs, and settings. Half of the GPUs only sample."""

WORLDS = (1024, 4096)

PICKLED_TOKEN, PICKLED_SAMPLE = 11.7, 200
"""Measured bytes of a pickled response, which every rank used to receive of every sample."""


def plan_at(name: str, gpus: int, *settings: str) -> Plan:
    """The recipe with as many ranks that train as ranks that only sample."""
    config = load_config(ROOT / f"examples/{name}.yaml", [*CASES[name][1], f"rollout.ranks={gpus // 2}", *settings])
    return make_plan(config, gpus)


def before(plan: Plan) -> tuple[float, float]:
    """Bytes of samples that each rank received in a step before, padded to the largest share, and of the model's
    copies on training rank 0."""
    rollout = plan.config.rollout
    count = rollout.prompts_per_step * rollout.responses_per_prompt
    samples = rollout.tensor * count * (PICKLED_TOKEN * rollout.max_response_tokens + PICKLED_SAMPLE)
    return samples, engine_parameters(plan.shape, 1) * 2.0


def rows(name: str) -> list[tuple[int, Plan, Traffic, Traffic]]:
    """GPUs, plan, and traffic without and with the sampler's routes."""
    found: list[tuple[int, Plan, Traffic, Traffic]] = []
    for gpus in (CASES[name][0], *WORLDS):
        replay = "none" if name == "qwen3_32b_async" else "sampler"
        plain, routed = (plan_at(name, gpus, f"train.router_replay={kind}") for kind in ("none", replay))
        moved = [traffic(plan.config, plan.shape, plan.world) for plan in (plain, routed)]
        found.append((gpus, plain, moved[0], moved[1]))
    return found


def table() -> str:
    """Markdown; of the fullest rank."""
    columns = ("recipe", "GPUs", "samples, MB", "with routes, MB", "senders", "weights sent, GB", "weights staged, GB")
    lines = [f"|{'|'.join((*columns, 'lanes of a training rank', 'of a rollout rank'))}|", "|---" * 9 + "|"]
    for name in CASES:
        found = rows(name)
        samples, model = before(found[0][1])
        copies = found[0][1].config.rollout.max_staleness + 1
        cells = [f"{samples / 1e6:,.0f}", "", "all", f"{model / 1e9:.0f}", f"{copies * model / 1e9:.0f} on rank 0"]
        lines.append(f"|`{name}`|before|{'|'.join(cells)}|1 on rank 0|1 on the first|")
        for gpus, _, plain, routed in found:
            cells = [f"{plain.samples / 1e6:.1f}", f"{routed.samples / 1e6:.0f}" if routed != plain else ""]
            cells += [str(plain.senders), f"{plain.sent / 1e9:.2f}", f"{plain.staged / 1e9:.2f}"]
            lines.append(f"||{gpus:,}|{'|'.join(cells)}|{plain.lanes}|{plain.rollout_lanes}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    start, _, rest = PAGE.read_text().partition(MARKERS[0])
    PAGE.write_text(start + MARKERS[0] + table() + MARKERS[1] + rest.partition(MARKERS[1])[2])
