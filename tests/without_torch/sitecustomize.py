"""Where this directory is on PYTHONPATH, Python starts with this: PyTorch is as if it were not installed."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
