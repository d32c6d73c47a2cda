"""High-throughput preference training: packing, prompt sharing, stored reference log-probs."""
