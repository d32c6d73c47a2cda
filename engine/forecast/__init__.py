"""What a run will need, before it is started: peak memory and time. No weights are loaded for it."""

from .duration import Duration, forecast_duration
from .memory import Memory, forecast_memory
from .target import Target
from .text import describe_forecast

__all__ = ["Duration", "Memory", "Target", "describe_forecast", "forecast_duration", "forecast_memory"]
