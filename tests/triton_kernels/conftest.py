"""The files of `interpreted/` need TRITON_INTERPRET=1 before triton is imported: test_interpreted.py starts them."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
