"""Which metrics have a panel."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

# Mid-tones: they read on white and on near-black. Blue is always A>0, orange always A<0.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3d85c6", "#e0813a", "#3a9e75", "#9a6fc4", "#d4526a", "#8b929c"
TIME_PARTS = {  # stacking order and colour
    "rollout": BLUE,
    "reward": GREEN,
    "old_logprobs": PURPLE,
    "update": ORANGE,
    "samples": "#3aa3a0",
    "eval": RED,
    "checkpoint": "#c2a83e",
    "other": GREY,
}


@dataclass(frozen=True)
class Panel:
    """One small plot. lines: (metric, label, colour); error: the first line's standard error, drawn as a band of 95%;
    guide: a value worth a thin horizontal line."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    phase: str = "train"
    error: str = ""
    guide: float | None = None
    log: bool = False
    percent: bool = False

    def split(self) -> "Iterator[Panel]":
        """A panel for every line: where runs are compared, colours tell the runs."""
        for i, line in enumerate(self.lines):
            title = self.title if len(self.lines) == 1 else f"{self.title}: {line[1]}"
            yield replace(self, title=title, lines=(line,), error="" if i else self.error)


PANELS = (
    Panel(
        "Reward",
        (("reward/mean", "mean, 95% band", BLUE), ("reward/accuracy", "share correct", GREEN)),
        error="reward/standard_error",
    ),
    Panel(
        "Held-out accuracy",
        (("eval/accuracy", "sampled", GREEN), ("eval/greedy_accuracy", "greedy", BLUE)),
        phase="eval",
        percent=True,
    ),
    Panel("Policy entropy", (("loss/entropy", "nats per token", PURPLE),)),
    Panel(
        "Mean importance ratio",
        (("loss/ratio_pos", "A > 0", BLUE), ("loss/ratio_neg", "A < 0", ORANGE)),
        guide=1.0,
    ),
    Panel(
        "Hard-clipped tokens",
        (("loss/clip_fraction_pos", "A > 0", BLUE), ("loss/clip_fraction_neg", "A < 0", ORANGE)),
        percent=True,
    ),
    Panel(
        "Soft-clipped tokens",
        (("loss/soft_clip_fraction_pos", "A > 0", BLUE), ("loss/soft_clip_fraction_neg", "A < 0", ORANGE)),
        percent=True,
    ),
    Panel("KL to the reference policy", (("loss/kl", "nats per token", PURPLE),)),
    Panel("KL to the old policy", (("loss/approx_kl", "nats per token", PURPLE),)),
    Panel(
        "Gradient norm, unclipped",
        (("optimizer/grad_norm", "mean", RED), ("optimizer/grad_norm_max", "largest", GREY)),
    ),
    Panel("Policy loss", (("loss/value", "per token", RED),)),
    Panel("Response length", (("rollout/response_length", "tokens", GREY),)),
    Panel(
        "Bad responses",
        (("rollout/repetition", "repeated 4-grams", ORANGE), ("rollout/truncated", "cut off", GREY)),
        percent=True,
    ),
    Panel(
        "Largest |log ratio| of a step's first update",
        (("loss/log_ratio_max_first", "0 if exact", RED),),
        log=True,
    ),
    Panel(
        "Prompt groups",
        (("rollout/groups_kept", "kept", GREEN), ("rollout/groups_dropped", "dropped: all alike", GREY)),
    ),
    Panel("Rollout throughput", (("rollout/tokens_per_second", "tokens/s", GREY),)),
    Panel("Warm-up loss", (("loss/nll", "nats per token", RED),), phase="warmup"),
)
