"""What an extension was built from: a hash of its sources. setup.py compiles it in, and `dispatch` compares."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")


def in_source_tree() -> bool:
    """Whether this package lies beside the sources of its extensions, as in a clone."""
    return (ROOT / "setup.py").is_file() and (ROOT / "csrc" / "shared").is_dir()


def source_hash(extension: str) -> str:
    """Of the sources in the tree that `hpkernels._cpu` or `hpkernels._cuda` is made of, by name and content."""
    digest = hashlib.sha256()
    folders = (ROOT / "csrc" / "shared", ROOT / "csrc" / extension.strip("_"))
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
