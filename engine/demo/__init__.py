"""``dpo demo``: the whole job in miniature, on a language that the demo makes up itself."""

from engine.demo.run import DemoResult, run_demo
from engine.demo.size import DemoSize, ModelSize

__all__ = ["DemoResult", "DemoSize", "ModelSize", "run_demo"]
