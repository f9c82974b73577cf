"""The files of `interpreted/` need TRITON_INTERPRET=1 before triton is imported: ops/test_interpreted.py sets it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
