"""Measure the verdicts per second of one worker process on typical answers: `python benchmarks/math_rewards.py`.

Each prompt has a group of responses, as in training, of which two thirds are right. Rates are per second of CPU time,
independent of other load.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import psutil

from megatron_aspo.rewards.mathematics.verifier import MathRewardConfig, MathVerifier

GROUP = 16


def problems(seed: int, prompts: int) -> dict[str, list[tuple[str, str]]]:
    """Return (response, right answer) pairs by kind of answer, GROUP responses per prompt."""
    rng = random.Random(seed)
    found: dict[str, list[tuple[str, str]]] = {"integers": [], "fractions": [], "short LaTeX": []}
    for _ in range(prompts):
        n, d, k = rng.randint(-999, 999), rng.randint(2, 99), rng.randint(2, 99)
        for i in range(GROUP):
            slip = 0 if i % 3 else rng.randint(1, 30)
            integer = (f"{n + slip}", f"x = {n + slip}", rf"{n + slip}\text{{ cm}}", rf"\${n + slip}.00")[i % 4]
            fraction = (rf"\frac{{{n + slip}}}{{{d}}}", rf"\dfrac{{{n + slip}}}{{{d}}}", f"{n + slip}/{d}")[i % 3]
            latex = (rf"{k + slip}\sqrt{{{d}}}", rf"\left({k + slip}, {d}\right)", rf"{k + slip}x^2 - {d}")
            right = (rf"{k}\sqrt{{{d}}}", f"({k},{d})", f"{k}x^2-{d}")
            for kind, answer, truth in (
                ("integers", integer, str(n)),
                ("fractions", fraction, f"{n}/{d}"),
                ("short LaTeX", latex[k % 3], right[k % 3]),
            ):
                found[kind].append((f"<think>{'So. ' * 500}</think>\nThe answer is $\\boxed{{{answer}}}$.", truth))
    return found


def cpu_seconds(verifier: MathVerifier) -> float:
    """Return the CPU time of the workers and this process."""
    times = [psutil.Process(process.pid).cpu_times() for process in verifier._processes]
    return sum(t.user + t.system for t in times) + time.process_time()


def measure(seed: int, prompts: int) -> dict[str, float]:
    """Return verdicts per second of CPU time by kind of answer; "mixed" is all kinds."""
    rates = {}
    kinds = problems(seed, prompts)
    kinds["mixed"] = [pair for kind in problems(seed + 1, prompts).values() for pair in kind]
    with MathVerifier(MathRewardConfig(workers=1)) as verifier:
        verifier.submit(r"\boxed{\frac{1}{3}}", "0.5").result()
        for kind, pairs in kinds.items():
            start = cpu_seconds(verifier)
            scores = [future.result().score for future in [verifier.submit(*pair) for pair in pairs]]
            rates[kind] = len(pairs) / (cpu_seconds(verifier) - start)
            if not 0.5 < sum(scores) / len(scores) < 0.75:
                sys.exit(f"{kind}: {sum(scores)} of {len(scores)} right, where two in three are")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for kind, rate in measure(arguments.seed, arguments.prompts).items():
        print(f"{kind:12} {rate:8.0f} verdicts/s/core")


if __name__ == "__main__":
    main()
