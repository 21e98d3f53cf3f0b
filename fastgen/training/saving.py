"""When a checkpoint's files are written: at once, or in a thread while training goes on; by the first
process, or by each its own parts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread

import torch
from accelerate import Accelerator
from torch import Tensor

from fastgen.networks.sharding import everywhere
from fastgen.training import checkpoint
from fastgen.training.stored_tensors import part_name, write


class Saver:
    """Writes one checkpoint after the other; at most one is unfinished at a time. A checkpoint gets its name
    when all of it is on the disk: until then the one before is the latest.
    """

    def __init__(self, folder: Path, acc: Accelerator, in_parts: bool, behind: bool):
        """in_parts: each process writes what it holds of spread tensors. behind: from a copy, in a thread."""
        self.folder, self.acc, self.in_parts, self.behind = folder, acc, in_parts, behind
        self.step: int | None = None  # of the checkpoint that is being written
        self.meta: dict = {}
        self.thread: Thread | None = None
        self.error: BaseException | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], begins: Mapping[str, Sequence[int]], meta: dict
    ) -> None:
        """Begin to write what this process has; every process of the run that writes calls it."""
        if not (self.in_parts or self.behind):
            checkpoint.save(self.folder, step, dict(tensors), meta)
            return
        self.step, self.meta, self.error = step, meta, None
        if self.acc.is_main_process:
            self._try(checkpoint.begin, self.folder, step)
        if self.in_parts:
            self.acc.wait_for_everyone()
        if self.in_parts and not tensors:
            return  # another process holds the same
        name = checkpoint.TENSORS
        if self.in_parts:
            name = part_name(self.acc.process_index, self.acc.num_processes)
        kept = {k: v.detach().to("cpu", copy=self.behind).contiguous() for k, v in tensors.items()}
        path = checkpoint.unfinished(self.folder, step) / name
        work = (write, path, kept, begins if self.in_parts else None)
        if self.behind:
            self.thread = Thread(target=self._try, args=work, name="checkpoint")
            self.thread.start()
        else:
            self._try(*work)

    def _try(self, call, *arguments) -> None:
        if self.error is None:
            try:
                call(*arguments)
            except BaseException as error:  # noqa: BLE001 - it is raised again by finish()
                self.error = error

    def finish(self, wait: bool = True) -> bool:
        """Seal the checkpoint that is being written, where all its files are there; without `wait` only if
        that is already so. Whether one was completed. With parts every process has to call it.
        """
        if self.step is None:
            return False
        done = wait or self.thread is None or not self.thread.is_alive()
        if self.in_parts:
            done = bool(everywhere(torch.tensor(done, device=self.acc.device)))
        if not done:
            return False
        self._join()
        step, self.step = self.step, None
        fine = self.error is None
        if self.in_parts:
            fine = bool(everywhere(torch.tensor(fine, device=self.acc.device)))
        with checkpoint.kept_on_failure(self.folder, step):
            if not fine:
                raise self.error or OSError("another process could not write its parts")
            if self.acc.is_main_process:
                checkpoint.seal(checkpoint.unfinished(self.folder, step), self.meta)
        return True

    def leave(self) -> None:
        """After an error: finish what one process writes alone; parts of several are not sealed, since others
        may have ended.
        """
        if self.in_parts:
            self._join()
            self.step = None
        else:
            self.finish()

    def _join(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None
