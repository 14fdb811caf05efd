"""``python -m filterwise.lab.early_warnings``."""

from __future__ import annotations

import sys

from filterwise.lab.early_warnings.command import main

sys.exit(main())
