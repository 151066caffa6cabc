"""This checkout, for processes of its own where loraplex is not installed."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
"""Its environment: a process without the current folder on its path finds the packages by this alone."""
