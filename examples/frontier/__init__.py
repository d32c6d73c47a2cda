"""The DPO paper's reward-KL frontier on a language that can be enumerated: ``python -m examples.frontier``."""
