"""The sets of versions that ``make test-versions`` tries."""

from __future__ import annotations

from tests.install.declared import pins

TRITON_OF_TORCH = {"2.11": "3.6.0", "2.12": "3.7.0", "2.13": "3.7.1", "2.14": "3.8.0", "2.15": "3.9.0"}
"""The Triton that a release of torch on PyPI requires on Linux, exactly."""

SETS = {
    "oldest": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"},
    "pinned": pins(),
    "newest": {"torch": "2.15.0", "transformers": "5.24.0"},
}
"""What each set pins; the rest is the newest that fits."""
