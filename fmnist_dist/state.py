"""What must survive: the step, the weights and what trains them, and the rows since the last save.

Everything else (order, augmentation, dropout masks, learning rate, epoch) follows from the settings
and the step, so no generator and nothing per rank is in here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fmnist_dist import digest, plan
from fmnist_dist.digest import EpochDigest, Lanes
from fmnist_dist.filenames import EMA, METRICS, MODEL, OPTIMIZER
from fmnist_dist.plan import Settings

_MOMENTUM = 0.9
_EMA_WARM_UP = 10  # steps: the decay at step t is at most (1 + t) / (10 + t), as in TensorFlow's


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step added up over all shards of the global batch, the same on every rank."""

    loss: float  # mean over the global batch
    correct: int
    count: int
    digest: Lanes
    buffers: list[Tensor]  # the model's new buffers, in the order of `model.buffers()`


class TrainState:
    """The state between two steps. Only `advance` and `load` change it."""

    def __init__(self, model: nn.Module, *, optimizer: str, settings: Settings) -> None:
        self.model = model
        self.optimizer = _make_optimizer(optimizer, model)
        self.ema = _averaged(model) if settings.ema > 0 else None
        self.step = 0
        self.ledger: tuple[EpochDigest, ...] = ()
        self.rows: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}  # the last value of each
        self.evaluated = False  # the evaluation due at this step is done

    def advance(self, step: plan.Step, result: StepResult) -> None:
        """Commit one optimizer step: gradients are in the parameters, the rest is in `result`."""
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr
            group["weight_decay"] = step.settings.weight_decay if group["decays"] else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, new in zip(self.model.buffers(), result.buffers, strict=True):
            buffer.copy_(new)
        if self.ema is not None:
            self._average(min(step.settings.ema, (1 + self.step) / (_EMA_WARM_UP + self.step)))
        self.step = step.step + 1
        self.evaluated = False
        self.ledger = digest.add(
            self.ledger, epoch=step.epoch, count=result.count, digest=result.digest
        )
        self.measure(
            epoch=step.epoch,
            train_loss=result.loss,
            train_accuracy=result.correct / result.count,
            lr=step.lr,
            samples=result.count,
        )

    def measure(self, **values: float) -> None:
        """Add a metric row for the current step."""
        self.rows.append({"step": self.step, **values})
        self.metrics.update(values)

    def saved(self) -> None:
        """Forget what a checkpoint of this very state holds: rows, and epochs that are over."""
        self.rows = []
        self.ledger = self.ledger[-1:]

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to evaluate and export: the averaged ones if there are any."""
        own = self.model.state_dict()
        return own if self.ema is None else {**own, **self.ema}

    def files(self) -> dict[str, bytes]:
        """Serialise; equal states give equal bytes. Metrics last: see `checkpoint.sweep`."""
        files = {
            MODEL: save(_dense(self.model.state_dict())),
            OPTIMIZER: save(_dense(dict(self._optimizer_tensors()))),
        }
        if self.ema is not None:
            files[EMA] = save(_dense(self.ema))
        files[METRICS] = "".join(f"{json.dumps(row)}\n" for row in self.rows).encode()
        return files

    @torch.no_grad()
    def load(
        self,
        files: Mapping[str, bytes],
        *,
        step: int,
        ledger: tuple[EpochDigest, ...],
        metrics: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """Become the state that `files` hold."""
        self.model.load_state_dict(load(files[MODEL]))
        parameters = dict(self.model.named_parameters())
        for name, tensor in load(files[OPTIMIZER]).items():
            owner, _, slot = name.rpartition(".")
            parameter = parameters[owner]
            # In the parameter's own memory order, as the optimizer itself would have made it.
            like = torch.empty_like(parameter) if tensor.shape == parameter.shape else tensor
            self.optimizer.state[parameter][slot] = like.copy_(tensor)
        if self.ema is not None:
            for name, tensor in load(files[EMA]).items():
                self.ema[name].copy_(tensor)
        self.step = step
        self.ledger = ledger[-1:]
        self.metrics = dict(metrics)
        self.rows = []
        self.evaluated = evaluated

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            for slot, value in self.optimizer.state[parameter].items():
                if value is not None:
                    assert isinstance(value, Tensor), f"{name}.{slot} is no tensor"
                    yield f"{name}.{slot}", value

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        assert self.ema is not None
        current = self.model.state_dict()
        torch._foreach_lerp_(
            list(self.ema.values()), [current[name] for name in self.ema], 1 - decay
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


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors wants contiguous tensors; channels_last ones are not.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
