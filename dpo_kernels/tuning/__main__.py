"""``python -m dpo_kernels.tuning``: the tuner without the engine."""

from __future__ import annotations

import sys

from dpo_kernels.tuning.command import run
from dpo_kernels.tuning.errors import TuningError


def main() -> int:
    try:
        return run(sys.argv[1:], prog="python -m dpo_kernels.tuning")
    except TuningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was found so far is in the table", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
