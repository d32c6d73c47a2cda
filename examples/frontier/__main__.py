"""Command line of the example: see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from engine.errors import UserError

from .run import RESULT, format_result, run
from .size import QUICK, Size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.frontier", description="The DPO paper in miniature.")
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of the reference, the pairs and their order")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each; 0: all in this one")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    if not 0 <= options.seed < 2**32:
        parser.error("--seed takes a number from 0 to 4294967295")
    size = replace(QUICK if options.quick else Size(), seed=options.seed)
    try:
        result = run(options.output, size, jobs=options.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{format_result(result)}\n")
    print(f"pictures   {options.output / 'frontier.png'}, {options.output / 'by-pairs.png'}")
    print(f"numbers    {options.output / 'points.csv'}, {options.output / RESULT}")
    print(f"runs       {options.output / 'dpo' / 'comparison.html'} and its like")
    return 0


if __name__ == "__main__":
    sys.exit(main())
