"""Checkpoints that are written while training goes on."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from olvae.files import atomic_write, write_json

__all__ = ["BackgroundCheckpointIO", "CheckpointError"]

log = logging.getLogger("olvae.training")


class CheckpointError(OSError):
    """A checkpoint could not be written; the message has its path."""


AT_ONCE = 2
"""Copies of checkpoints in host memory."""


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Copies a checkpoint to host memory, and writes the copy to disk in a thread.

    A file appears complete or not at all. Files are written in the order of the saves, two of which may be under way:
    the last and the best of one step; a third waits. An error in the thread is raised by a later save, or by
    :meth:`teardown`, which Lightning calls at the end of training and after an exception.

    Args:
        on_saved: called in the thread with the path of each checkpoint that is on the disk.
    """

    def __init__(self, on_saved: Callable[[Path], None] | None = None) -> None:
        self._on_saved = on_saved
        self._threads: list[Thread] = []
        self._error: CheckpointError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: dict[str, Any] | None = None
    ) -> None:
        """Start to save; what the checkpoint holds may change afterwards.

        Args:
            checkpoint: of tensors, numbers and text, in dicts, lists and tuples.
            path: on this machine's file system.
            storage_options: written in JSON beside the checkpoint, once it is complete: a.json for a.ckpt.

        Raises:
            CheckpointError: one before this could not be written.
        """
        self._wait(AT_ONCE - 1)
        copied = _on_host(checkpoint)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        before = self._threads[-1] if self._threads else None
        thread = Thread(target=self._write, args=(before, copied, Path(path), storage_options), name="checkpoint")
        thread.start()
        self._threads.append(thread)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self._wait(0)

    def _wait(self, left: int) -> None:
        """Wait until no more than so many are under way."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        while len(self._threads) > left:
            self._threads.pop(0).join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def teardown(self) -> None:
        failed = sys.exc_info()[0] is not None  # training has an error of its own, which ends it
        try:
            self.wait()
        except CheckpointError as error:
            if not failed:
                raise
            log.error("%s", error)

    def _write(
        self, before: Thread | None, checkpoint: dict[str, Any], path: Path, note: dict[str, Any] | None
    ) -> None:
        if before is not None:
            before.join()
        try:
            with atomic_write(path) as partial:
                torch.save(checkpoint, partial)
            if note is not None:
                write_json(note, path.with_suffix(".json"))
            if self._on_saved is not None:
                self._on_saved(path)
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if not path.parent.is_dir():
                reason = "the run's folder is gone"
            self._error = CheckpointError(f"{path}: the checkpoint could not be written: {reason}")
            self._error.__cause__ = error


def _on_host(value: Any) -> Any:
    """A copy that shares no memory. Copies from a GPU go to pinned memory, and have arrived once it is synchronised."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, non_blocking=True)
    if isinstance(value, dict):
        return {key: _on_host(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_host, value))
    return value
