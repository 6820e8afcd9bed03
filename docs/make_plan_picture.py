"""Draws plan_32b.png: the memory that the planner expects of examples/qwen2_5_32b.yaml, by phase.

python docs/make_plan_picture.py
"""

from pathlib import Path

from megatron_aspo.config_file import load_config
from megatron_aspo.planning.plan import make_plan
from megatron_aspo.planning.show import draw_plan

HERE = Path(__file__).parent

draw_plan(make_plan(load_config(HERE.parent / "examples" / "qwen2_5_32b.yaml")), HERE / "plan_32b.png")
