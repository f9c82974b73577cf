"""Writing files so that none is ever half there, and no two programs write to one run."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from hpseg.run.errors import UsageError

if TYPE_CHECKING:  # torch is slow to import, and `hpseg --help` needs none
    from torch import Tensor

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
TEMPORARY = re.compile(r"\.hpseg-[0-9a-f]{16}\.tmp")
ABANDONED_SECONDS = 24 * 3600  # a temporary file of that age has no writer any more


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes under a temporary name of its own, flushes to the disk and renames: at any moment the old file is there or
    the new, whoever else writes it. What could not be written is removed."""
    temporary = path.with_name(f".hpseg-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_temporaries(folders: Iterable[Path], own: bool) -> None:
    """Removes what killed writers left: all of it in folders that nobody else writes to (own), else what is old."""
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if TEMPORARY.fullmatch(path.name):
                with suppress(FileNotFoundError):  # its writer has just renamed it
                    if own or time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                        path.unlink()


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_torch(path: Path, content: Any) -> None:
    """What `read_torch` reads, all at once: tensors, numbers, strings and containers of them."""
    import torch

    stream = io.BytesIO()
    torch.save(content, stream)
    write_atomically(path, stream.getbuffer())


def write_image(path: Path, image: Image.Image, **options) -> None:
    """`Image.save` with its options, in the format of the ending, all at once."""
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[path.suffix.lower()], **options)
    write_atomically(path, content.getvalue())


def write_array(path: Path, array: np.ndarray) -> None:
    """An .npy file, all at once."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_atomically(path, content.getvalue())


def read_torch(argument: str, path: Path, advice: str = "") -> Any:
    """What `torch.save` wrote to `path`, as long as that is tensors, numbers, strings and containers of them: nothing
    else is unpickled. UsageError otherwise, with what to do about it."""
    import torch
    from safetensors import SafetensorError  # torch reads files of that ending by it

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{argument}: {path} is not a torch file of plain tensors ({reason}){advice}") from None


class Damaged(ValueError):
    """What a file holds is not what was written; the message says how that shows, without the file's name."""


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all metadata and tensors with their names; of tensors their bytes."""
    import torch

    digest = hashlib.sha256("".join(metadata[name] for name in sorted(metadata)).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a safetensors file whose metadata has, as "sha256", the checksum that `read_checked` asks for.
    tensors: on the CPU, contiguous."""
    from safetensors.torch import save

    return save(tensors, {**metadata, "sha256": checksum(tensors, metadata)})


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which are mapped into memory, and metadata of a file with the content of `save_checked`. Damaged where
    it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Damaged(str(error)) from None
    if metadata.pop("sha256", None) != checksum(tensors, metadata):
        raise Damaged("its checksum is wrong")
    return tensors, metadata


def require_folder(argument: str, path: Path) -> None:
    """UsageError if `path` cannot be a folder, as it or something above it is a file, or a link that leads nowhere."""
    for part in (path, *path.parents):
        if os.path.lexists(part) and not part.is_dir():
            what = "a file" if part.exists() else "a link to nothing"
            raise UsageError(f"{argument}: {part} is {what}, expected a folder")


def require_file(argument: str, path: Path, overwrite: bool) -> None:
    """UsageError if `path` cannot be a new file: it is a folder, or, unless `overwrite`, there, or below a file."""
    if path.is_dir():
        raise UsageError(f"{argument}: {path} is a folder, expected the name of a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{argument}: {path} is already there; pass --overwrite to replace it, or another name")
    require_folder(argument, path.parent)


class RunLock:
    """Keeps a second program out of a run folder that one writes to, from `acquire` to the end of the with block, or of
    the process, however that ends."""

    def __init__(self, run: Path):
        self.run, self._lock = run, FileLock(run / LOCK, timeout=0)

    def acquire(self) -> None:
        """The folder must exist. UsageError if another program has it; no lock where the file system knows none."""
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise UsageError(
                f"out: another program is writing to {self.run}; wait for it, or name another folder"
            ) from None
        except NotImplementedError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *raised: object) -> None:
        self._lock.release()
