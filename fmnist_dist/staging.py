"""Memory of the host for one copy of the state: what a step pays for a save, and all it pays.

It is laid out as the files of a checkpoint (`tensorfile`), made once and filled again and again, so
a save needs no second copy and none of its bytes is touched for the first time within a step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fmnist_dist.tensorfile import TensorFile

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file and name: `TrainState.tensors_by_file`


class Staging:
    """One copy of a state: `copy` it, then take its `files`. For one thread at a time."""

    def __init__(self, tensors: Tensors) -> None:
        devices = {each.device for file in tensors.values() for each in file.values()}
        on_device = any(device.type == "cuda" for device in devices)
        self._files = {name: TensorFile(file, pinned=on_device) for name, file in tensors.items()}
        # On a GPU (not run here: there is none): the copies run beside what comes after them.
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        if on_device:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._is_arranged = False

    def fits(self, tensors: Tensors) -> bool:
        """Whether this was made for such tensors.

        They are others once the optimizer has taken its first step.
        """
        return tensors.keys() == self._files.keys() and all(
            self._files[name].fits(file) for name, file in tensors.items()
        )

    def touch(self) -> None:
        """Write to all of the memory, so that the system gives it now, and not within a step."""
        for file in self._files.values():
            for place in file.tensors:
                place.zero_()

    @torch.no_grad()
    def copy(self, tensors: Tensors) -> None:
        """Copy what fits; the state must stand still meanwhile (`TrainState.still`)."""
        self._is_arranged = False
        places = [place for file in self._files.values() for place in file.tensors]
        sources = [each.detach() for file in tensors.values() for each in file.values()]
        if self._stream is None or self._copied is None:
            torch._foreach_copy_(places, sources)
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(places, sources, non_blocking=True)
            self._copied.record()
        # The next update must not overtake the copy. The device waits for it, this thread does not.
        current.wait_stream(self._stream)

    def files(self) -> dict[str, memoryview]:
        """Return the checkpoint's files of tensors; no copy, so they hold until the next one."""
        if self._copied is not None:
            self._copied.synchronize()
        if not self._is_arranged:
            self._is_arranged = True
            for file in self._files.values():
                file.arrange()
        return {name: file.data for name, file in self._files.items()}
