"""What a run will need, before it is started: peak memory and time. No weights are loaded for it."""

from engine.forecast.duration import Duration, forecast_duration
from engine.forecast.memory import Memory, forecast_memory
from engine.forecast.text import describe_forecast

__all__ = ["Duration", "Memory", "describe_forecast", "forecast_duration", "forecast_memory"]
