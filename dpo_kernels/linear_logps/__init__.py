"""Per-token log-probs of a linear head."""
