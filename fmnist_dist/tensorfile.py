"""A safetensors file in memory: laid out once, filled again and again, written without a copy.

The format: 8 bytes of the header's length, the header as JSON, and the tensors' bytes, in the order
and with the padding of the safetensors library (`safetensors/src/tensor.rs`): equal tensors give
its very bytes. The library itself copies every byte twice, under Python's lock.
"""

import ctypes
import json
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

# As the library sorts them: the wider ones first, so that each tensor lies at a multiple of its
# width. By name within one type.
_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _TYPES.items()}
_ORDER = {dtype: number for number, dtype in enumerate(_TYPES)}
_PADDING = 8  # the header ends at a multiple, with blanks
_LINE = 64  # bytes of a cache line: a copy to where none begins took up to twice as long

Form = list[tuple[str, torch.Size, tuple[int, ...], torch.dtype]]


class TensorFile:
    """Memory for the file of tensors like these, names and shapes as they are now.

    `tensors` are its places, in the order in which they were given: fill them, then `arrange`. Each
    has the strides of its tensor and begins a cache line, so that filling it is a copy of memory
    as it lies. What `arrange` has moved to where the file has it, is no longer in its place.
    """

    def __init__(self, like: Mapping[str, Tensor], *, pinned: bool = False) -> None:
        self._form = _form(like)
        header, starts = _layout(like)
        total = len(header) + sum(map(_num_bytes, like.values()))
        spare = _LINE * (len(like) + 1)
        memory = torch.empty(total + spare, dtype=torch.uint8, pin_memory=pinned)
        # The tensors' bytes begin a line, the file therefore somewhere before it.
        begin = -(memory.data_ptr() + len(header)) % _LINE
        memory[begin : begin + len(header)].copy_(_bytes_of(header))
        self._file = memory[begin : begin + total]
        places: dict[str, Tensor] = {}
        self._moves: list[tuple[Tensor, Tensor]] = []  # (its place, the file's) of what must move
        end = begin
        for name, start in starts.items():
            tensor = like[name]
            first = begin + len(header) + start
            # At or after where the file has it: so one after the other can move there.
            at = max(first, end)
            at += -(memory.data_ptr() + at) % _LINE
            end = at + _num_bytes(tensor)
            target = memory[first : first + _num_bytes(tensor)].view(tensor.dtype)
            # Strides of a tensor with gaps or overlaps are those of a dense relative.
            strides = torch.empty_like(tensor, device="meta").stride()
            place = memory[at:end].view(tensor.dtype).as_strided(tensor.shape, strides)
            places[name] = place
            if at != first or not place.is_contiguous():
                self._moves.append((place, target.view(tensor.shape)))
        self.tensors = [places[name] for name in like]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the file of these tensors is laid out so."""
        return self._form == _form(tensors)

    def arrange(self) -> None:
        """Move the tensors that were filled in to where the file has them, the first one first."""
        for place, target in self._moves:
            if place.is_contiguous():
                # They may overlap. ctypes lets other threads run meanwhile.
                ctypes.memmove(target.data_ptr(), place.data_ptr(), _num_bytes(place))
            else:
                target.copy_(place.clone())

    @property
    def data(self) -> memoryview:
        """The file's bytes as they are now; no copy."""
        return self._file.numpy().data


def read(data: bytes | memoryview) -> dict[str, Tensor]:
    """Return the tensors of a file that is known to be whole, by name: views of its bytes.

    Nothing may write to them.
    """
    memory = as_tensor(data)
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(bytes(data[8:begin]))
    entries.pop("__metadata__", None)
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        first, end = entry["data_offsets"]
        flat = memory[begin + first : begin + end].view(_BY_NAME[entry["dtype"]])
        found[name] = flat.view(entry["shape"])
    return found


def as_tensor(data: bytes | memoryview) -> Tensor:
    """Return bytes as a tensor, uint8 [n], without a copy: nothing may write to it."""
    if not len(data):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written to: nobody does
        return torch.frombuffer(data, dtype=torch.uint8)


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return what stands before the tensors' bytes, and where each one's begin after it."""
    entries: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name)):
        tensor = tensors[name]
        starts[name], end = end, end + _num_bytes(tensor)
        entries[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PADDING)
    return len(text).to_bytes(8, "little") + text, starts


def _form(tensors: Mapping[str, Tensor]) -> Form:
    return [(name, each.shape, each.stride(), each.dtype) for name, each in tensors.items()]


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
