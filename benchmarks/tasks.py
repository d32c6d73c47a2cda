"""What contenders of the head's benchmarks are asked for, and how it is tabulated. Imports nothing."""

LOSS = "loss"
"""DPO loss, gradients of hidden states and weight."""
FROZEN = "loss, frozen head"
"""DPO loss, gradient of hidden states."""
LOGPS = "log-probs"
"""Per token, no gradients."""
GRADIENTS = "log-probs and gradients"
"""Per token, with an upstream gradient of its own for each; gradients of hidden states and weight."""

COLUMNS = (
    "task",
    "contender",
    "G",
    "ms",
    "x own floor",
    "x 3G floor",
    "extra MiB",
    "token error",
    "response error",
    "dX error",
    "dW error",
    "note",
)
LEGEND = (
    "G: stated work, in products of 2 N D V operations. Floors: bare products of the same run. Extra memory: peak of "
    "torch's allocator beyond inputs and results. Errors against float64 of the same inputs: largest difference of a "
    "log-prob, per token and summed per response, in nats; gradients as |difference| / |gradient|."
)
