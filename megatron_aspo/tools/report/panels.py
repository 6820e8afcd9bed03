"""The panels of a report and their metrics."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        lines: label of each curve -> its metric.
        percent: the values are shares.
    """

    title: str
    lines: dict[str, str]
    phase: str = "train"
    percent: bool = False

    def split(self) -> "Iterator[Panel]":
        """One panel per curve, for a comparison of runs, where colours stand for runs."""
        for label, metric in self.lines.items():
            title = self.title if len(self.lines) == 1 else f"{self.title}: {label}"
            yield replace(self, title=title, lines={label: metric})


PANELS = (
    Panel("Reward", {"mean": "reward/mean", "share correct": "reward/accuracy"}),
    Panel("Held-out accuracy", {"sampled": "eval/accuracy", "greedy": "eval/greedy_accuracy"}, "eval", percent=True),
    Panel("Policy entropy, nats per token", {"": "loss/entropy"}),
    Panel("Mean importance ratio", {"A > 0": "loss/ratio_pos", "A < 0": "loss/ratio_neg"}),
    Panel("Hard-clipped tokens", {"A > 0": "loss/clip_fraction_pos", "A < 0": "loss/clip_fraction_neg"}, percent=True),
    Panel(
        "Soft-clipped tokens",
        {"A > 0": "loss/soft_clip_fraction_pos", "A < 0": "loss/soft_clip_fraction_neg"},
        percent=True,
    ),
    Panel("KL to the reference policy, nats per token", {"": "loss/kl"}),
    Panel("KL to the anchor of the ratio, nats per token", {"": "loss/approx_kl"}),
    Panel("Gradient norm, unclipped", {"mean": "optimizer/grad_norm", "largest": "optimizer/grad_norm_max"}),
    Panel("Policy loss", {"": "loss/value"}),
    Panel("Response length, tokens", {"": "rollout/response_length"}),
    Panel("Turns per response", {"": "rollout/turns"}),
    Panel("Bad responses", {"repetitive": "rollout/repetition", "cut off": "rollout/truncated"}, percent=True),
    Panel("Largest |log r| of a step's first update", {"": "loss/log_ratio_max_first"}),
    Panel("Prompt groups", {"kept": "rollout/groups_kept", "dropped: all alike": "rollout/groups_dropped"}),
    Panel("Time per step, seconds", {"all": "time/step", "rollout": "time/rollout", "update": "time/update"}),
    Panel("Rollout throughput, tokens/s", {"": "rollout/tokens_per_second"}),
    Panel("Warm-up loss, nats per token", {"": "loss/nll"}, "warmup"),
)
