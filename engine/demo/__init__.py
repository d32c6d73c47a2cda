"""``dpo demo``: the whole job in miniature, on a language that the demo makes up itself."""

from .run import DemoResult, run_demo
from .size import DemoSize, ModelSize

__all__ = ["DemoResult", "DemoSize", "ModelSize", "run_demo"]
