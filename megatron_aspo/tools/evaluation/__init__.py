"""Evaluation on public benchmarks: problems, responses that survive a kill, avg@k and pass@k."""
