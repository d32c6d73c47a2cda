"""Training: the loop, its optimizer and schedule, metrics, checkpoints and the final model."""
