"""What every test gets: one thread per process, and no way to a model hub.

Set before torch or transformers are imported, since both read the environment once. `make test`
exports the same; these lines serve a plain `pytest tests/noise`.
"""

from __future__ import annotations

import os

# Test processes share the cores; and a sum that is split over threads may round differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Tokenizers warns, in every test that forks, unless it is told.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Not setdefault: a test that reaches for a hub must fail on every machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
