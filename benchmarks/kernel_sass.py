"""What the assembler made of a kernel: the wait inside its main loop, and the instructions after its products.

Counts need no GPU, and tell of a regression that times of a busy machine would hide.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

_PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)")
_TARGET = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")


class Sass(NamedTuple):
    """Instructions and labels of a kernel, in their order."""

    lines: list[str]

    @classmethod
    def of(cls, kernel: Any) -> Sass:
        """Disassemble a compiled kernel with the tool that Triton brings."""
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
        return cls.read(text)

    @classmethod
    def read(cls, text: str) -> Sass:
        """From a listing of nvdisasm."""
        lines = []
        for line in text.splitlines():
            if found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
                lines.append(found[1].strip())
            elif found := re.match(r"(\.L_x_\d+):", line):
                lines.append(found[1])
        return cls(lines)

    def waits_in_loop(self) -> list[int]:
        """How many groups of products may be in flight at each wait between the first and the last `wgmma`."""
        products = [i for i, line in enumerate(self.lines) if _PRODUCT.search(line)]
        loop_end = next((i for i in range(products[-1], len(self.lines)) if self._jumps_back(i)), products[-1])
        inside = self.lines[products[0] : loop_end]
        return [int(found[1], 16) for line in inside if (found := _WAIT.search(line))]

    def epilogue(self) -> int:
        """Fewest instructions of a warp from its last product to its end: what most tiles execute."""
        last = max(i for i, line in enumerate(self.lines) if _PRODUCT.search(line))
        places = {line: i for i, line in enumerate(self.lines) if line.startswith(".L")}
        never = len(self.lines) + 1
        fewest = [never] * (len(self.lines) + 1)
        for i in range(len(self.lines) - 1, last, -1):
            line = self.lines[i]
            if line.startswith(".L"):
                fewest[i] = fewest[i + 1]
            elif line.startswith("EXIT"):
                fewest[i] = 1
            elif found := _TARGET.search(line):
                jump = fewest[places[found[1]]] if places[found[1]] > i else never
                # BRA.DIV leaves the way only where the threads of a warp have parted.
                conditional = line.startswith(("@", "BRA.DIV"))
                fewest[i] = 1 + (min(jump, fewest[i + 1]) if conditional else jump)
            else:
                fewest[i] = 1 + fewest[i + 1]
        return fewest[last + 1]

    def _jumps_back(self, i: int) -> bool:
        found = _TARGET.search(self.lines[i])
        return bool(found) and found[1] in self.lines[:i]
