"""One op a folder: `op.py` registers it, one file a backend implements it."""
