"""Where bytes live and where work runs; nothing here knows about learning."""

from __future__ import annotations

import os

# Read by torch when it first allocates: large tensors in huge pages, where the kernel offers them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
