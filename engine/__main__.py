"""``python -m engine`` is ``dpo``, for launchers that start a module."""

import sys

from engine.cli import main

sys.exit(main())
