"""What must survive: the step, the weights and what trains them, and the rows since the last save.

Everything else (order, augmentation, dropout masks, learning rate, epoch) follows from the settings
and the step, so no generator and nothing per rank is in here.

Between two commits (`advance` and the other methods that change something) the state stands still:
the quiet window. A step works on the model's own buffers as scratch; the committed ones are kept
here. So any thread may take the state while a step runs, and a step that fails leaves no trace.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmnist_dist import digest, plan, tensorfile
from fmnist_dist.digest import EpochDigest, Lanes
from fmnist_dist.filenames import EMA, MODEL, OPTIMIZER
from fmnist_dist.plan import Settings

_MOMENTUM = 0.9
_SLOT = "slot:"
_EMA_WARM_UP = 10  # steps: the decay at step t is at most (1 + t) / (10 + t), as in TensorFlow's


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step added up over all shards of the global batch, the same on every rank."""

    loss: float  # mean over the global batch
    correct: int
    count: int
    digest: Lanes
    buffers: list[Tensor]  # the model's new buffers, in the order of `model.buffers()`


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable:
    """A committed checkpoint: the index of its record, and how much of the rows it holds."""

    index: int
    step: int
    epoch: int  # the last one in its ledger
    evaluated: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the metrics."""

    step: int
    is_score: bool  # of the evaluation due at that step
    line: bytes


class TrainState:
    """The state between two steps; every public method may be called from any thread."""

    def __init__(self, model: nn.Module, *, optimizer: str, settings: Settings) -> None:
        self.model = model
        self.optimizer = _make_optimizer(optimizer, model)
        self.ema = _averaged(model) if settings.ema > 0 else None
        self.buffers = [buffer.detach().clone() for buffer in model.buffers()]  # committed
        # Kept, since a walk through the model costs a tenth of a millisecond in each step and save:
        # parameters are changed in place only.
        names = [name for name, _ in model.named_buffers()]
        self._committed = {**model.state_dict(), **dict(zip(names, self.buffers, strict=True))}
        self.step = 0
        self.ledger: tuple[EpochDigest, ...] = ()  # of every epoch touched since the parent
        self.metrics: dict[str, float] = {}  # the last value of each
        self.evaluated = False  # the evaluation due at this step is done
        self.parent: int | None = None  # record of the checkpoint that ledger and rows begin at
        self._rows: list[Row] = []
        self._lock = threading.RLock()

    def still(self) -> AbstractContextManager[object]:
        """Hold the state still for several looks at it; commits wait meanwhile."""
        return self._lock

    @property
    def position(self) -> int:
        """How far the state is: of two, the higher one follows from the lower one."""
        return 2 * self.step + self.evaluated

    @property
    def skipped(self) -> int:
        """How many steps in a row, up to now, had no loss: known to whoever goes on, too."""
        return int(self.metrics.get("skipped", 0))

    def advance(
        self, step: plan.Step, result: StepResult, *, durable: Durable | None = None
    ) -> None:
        """Commit one optimizer step: gradients are in the parameters, the rest is in `result`.

        `durable` is the newest checkpoint that all ranks know of: its rows need no second saving.
        """
        with self._lock:
            for group in self.optimizer.param_groups:
                group["lr"] = step.lr
                group["weight_decay"] = step.settings.weight_decay if group["decays"] else 0.0
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, new in zip(self.buffers, result.buffers, strict=True):
                buffer.copy_(new)
            self._show_buffers()
            if self.ema is not None:
                self._average(min(step.settings.ema, (1 + self.step) / (_EMA_WARM_UP + self.step)))
            self._count(step, result)
            self.measure(
                epoch=step.epoch,
                train_loss=result.loss,
                train_accuracy=result.correct / result.count,
                lr=step.lr,
                samples=result.count,
                **({"skipped": 0} if self.skipped else {}),
            )
            self._settle(durable)

    def pass_over(
        self, step: plan.Step, result: StepResult, *, durable: Durable | None = None
    ) -> None:
        """Consume a step's samples without learning from them: nothing but the step moves."""
        with self._lock:
            self.optimizer.zero_grad(set_to_none=True)
            self._count(step, result)
            skipped = {"skipped": self.skipped + 1} if step.learns else {}
            self.measure(epoch=step.epoch, passed_over=1, samples=result.count, **skipped)
            self._settle(durable)

    def measure(self, **values: float) -> None:
        """Add a metric row for the current step."""
        self._add_row(values, is_score=False)

    def score(self, **values: float) -> None:
        """Add the metric row of the evaluation due at this step."""
        with self._lock:
            self._add_row(values, is_score=True)
            self.evaluated = True

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and export: the averaged ones if there are any."""
        return {**self._committed, **(self.ema or {})}

    def tensors_by_file(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that a checkpoint holds, as they are in memory, by file and name."""
        files = {MODEL: self._committed, OPTIMIZER: dict(self._optimizer_tensors())}
        if self.ema is not None:
            files[EMA] = self.ema
        return files

    def rows(self) -> tuple[Row, ...]:
        """Return the metric rows since the parent."""
        with self._lock:
            return tuple(self._rows)

    def image(self) -> list[bytes | memoryview]:
        """Return the whole state as bytes, for memory of the same build: no copy, no format.

        The memory of the tensors is handed out as it is: use it before the state changes.
        """
        tensors = list(self._tensors())
        flat = [_memory(tensor).cpu() for _, tensor in tensors]
        facts = {
            "step": self.step,
            "evaluated": self.evaluated,
            "parent": self.parent,
            "metrics": self.metrics,
            "ledger": [asdict(each) for each in self.ledger],
            "rows": [[row.step, row.is_score, len(row.line)] for row in self._rows],
            "tensors": [
                [name, len(bytes_)] for (name, _), bytes_ in zip(tensors, flat, strict=True)
            ],
        }
        header = json.dumps(facts).encode()
        return [
            len(header).to_bytes(8, "little"),
            header,
            b"".join(row.line for row in self._rows),
            *(memoryview(each.numpy().data) for each in flat),
        ]

    def digest(self) -> str:
        """Return the SHA-256 of the tensors and the step, as hex: equal on all healthy ranks."""
        with self._lock:
            digest = hashlib.sha256(str(self.step).encode())
            for name, tensor in self._tensors():
                digest.update(name.encode())
                digest.update(_memory(tensor).cpu().numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def load(
        self,
        files: Mapping[str, bytes | memoryview],
        *,
        step: int,
        ledger: tuple[EpochDigest, ...],
        metrics: Mapping[str, float],
        evaluated: bool,
        parent: int | None = None,
    ) -> None:
        """Become the state that `files` hold."""
        with self._lock:
            self.model.load_state_dict(tensorfile.read(files[MODEL]))
            for buffer, loaded in zip(self.buffers, self.model.buffers(), strict=True):
                buffer.copy_(loaded)
            parameters = dict(self.model.named_parameters())
            for name, tensor in tensorfile.read(files[OPTIMIZER]).items():
                owner, _, slot = name.rpartition(".")
                parameter = parameters[owner]
                # In the parameter's own memory order, as the optimizer itself would have made it.
                is_like = tensor.shape == parameter.shape
                like = torch.empty_like(parameter if is_like else tensor)
                self.optimizer.state[parameter][slot] = like.copy_(tensor)
            if self.ema is not None:
                for name, tensor in tensorfile.read(files[EMA]).items():
                    self.ema[name].copy_(tensor)
            self.step = step
            self.ledger = ledger[-1:]
            self.metrics = dict(metrics)
            self._rows = []
            self.evaluated = evaluated
            self.parent = parent

    @torch.no_grad()
    def load_image(self, image: bytes | memoryview) -> None:
        """Become the state of an `image` that is whole: whoever got it has checked its digest."""
        start = 8 + int.from_bytes(image[:8], "little")
        facts = json.loads(bytes(image[8:start]))
        memory = tensorfile.as_tensor(image)
        rows = []
        for step, is_score, length in facts["rows"]:
            rows.append(Row(step, is_score, bytes(image[start : start + length])))
            start += length
        with self._lock:
            self.optimizer.zero_grad(set_to_none=True)
            targets = dict(self._tensors())
            for name, length in facts["tensors"]:
                source = memory[start : start + length]
                start += length
                if name not in targets:
                    targets[name] = self._make_slot(name, length)
                _memory(targets[name]).copy_(source)
            self._show_buffers()
            self.step = facts["step"]
            self.evaluated = facts["evaluated"]
            self.parent = facts["parent"]
            self.metrics = facts["metrics"]
            self.ledger = tuple(
                EpochDigest(epoch=e["epoch"], count=e["count"], digest=tuple(e["digest"]))
                for e in facts["ledger"]
            )
            self._rows = rows

    def _show_buffers(self) -> None:
        """Give the model the committed buffers: until a step begins it is the state's, whole."""
        for buffer, committed in zip(self.model.buffers(), self.buffers, strict=True):
            buffer.copy_(committed)

    def _count(self, step: plan.Step, result: StepResult) -> None:
        self.step = step.step + 1
        self.evaluated = False
        self.ledger = digest.add(
            self.ledger, epoch=step.epoch, count=result.count, digest=result.digest
        )

    def _add_row(self, values: Mapping[str, float], *, is_score: bool) -> None:
        with self._lock:
            line = json.dumps({"step": self.step, **values}).encode() + b"\n"
            self._rows.append(Row(self.step, is_score, line))
            self.metrics.update(values)

    def _settle(self, durable: Durable | None) -> None:
        """Forget what a checkpoint holds: its rows, and the epochs that were over by then.

        Every rank does so when it commits the same step, so that all hold the same bytes.
        """
        if durable is None or durable.index == self.parent or durable.step > self.step:
            return
        self.parent = durable.index
        self._rows = [
            row
            for row in self._rows
            if row.step > durable.step
            or (row.step == durable.step and row.is_score and not durable.evaluated)
        ]
        self.ledger = tuple(each for each in self.ledger if each.epoch >= durable.epoch)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the state under a name of its own, in a fixed order."""
        for name, parameter in self.model.named_parameters():
            yield f"parameter:{name}", parameter.detach()
        for number, buffer in enumerate(self.buffers):
            yield f"buffer:{number}", buffer
        for name, tensor in self._optimizer_tensors():
            yield f"{_SLOT}{name}", tensor
        for name, tensor in (self.ema or {}).items():
            yield f"ema:{name}", tensor

    def _make_slot(self, name: str, length: int) -> Tensor:
        """Make the tensor that the optimizer itself makes at its first step."""
        owner, _, slot = name.removeprefix(_SLOT).rpartition(".")
        parameter = dict(self.model.named_parameters())[owner]
        is_like = length == parameter.numel() * parameter.element_size()
        # What is smaller than the parameter is a counter (Adam's `step`): float32, on the CPU.
        made = torch.empty_like(parameter) if is_like else torch.empty((), dtype=torch.float32)
        self.optimizer.state[parameter][slot] = made.detach()
        return made.detach()

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            # By name: torch makes them in an order of its own, a file gives them in another.
            for slot, value in sorted(self.optimizer.state[parameter].items()):
                if value is not None:
                    assert isinstance(value, Tensor), f"{name}.{slot} is no tensor"
                    yield f"{name}.{slot}", value

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        assert self.ema is not None
        torch._foreach_lerp_(
            list(self.ema.values()), [self._committed[name] for name in self.ema], 1 - decay
        )


def _make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer; weight decay holds for weights, not for biases and normalisation."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "decays": True},
        {"params": vectors, "decays": False},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=_MOMENTUM, nesterov=True, foreach=True)
    return torch.optim.AdamW(groups, lr=0.0, foreach=True)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all floating-point parameters and buffers."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def _memory(tensor: Tensor) -> Tensor:
    """Return the bytes of a dense tensor in the order in which they lie in memory, uint8 [n]."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
