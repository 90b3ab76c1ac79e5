"""What a save costs the training step, against what others cost, and what memory it takes.

    python benchmarks/saves.py [--url RUN] [--saves N] [--states cnn,100,500]

For the default CNN and for synthetic models of so many MB of state, each in a process of its own,
trains steps of real work on one thread and saves again and again. `pause` is what the training
thread spends for a save: for `ours` in `Saves.wants` and `Saves.offer`; for the others in a
synchronous `torch.save` (with fsync, as ours), in `torch.distributed.checkpoint.async_save` until
it returns, and in the bare copy of the same tensors into memory that is there. The variants take
turns. `beside` is how much longer a step takes while the thread works than without a save.
`memory` is the peak of the process beyond training, as a multiple of the state, ours alone first.
`--url` is the run folder (default: a temporary one); prints one JSON object.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from fmnist_dist.agreement import settings_of
from fmnist_dist.checkpoint.log import RunLog
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.record import Attempt
from fmnist_dist.checkpoint.writer import RunWriter
from fmnist_dist.config import Config
from fmnist_dist.distributed import world
from fmnist_dist.handover.board import Board
from fmnist_dist.models import make_model
from fmnist_dist.plan import Plan
from fmnist_dist.saves import Saves
from fmnist_dist.state import StepResult, TrainState
from fmnist_dist.telemetry.progress import NullProgress

WIDTH = 1024  # of a synthetic layer: 4 MB of weights
STEPS_BETWEEN = 3  # without a save, before each one
WORK_SIZE = 256  # of the matrices that a step multiplies
WORK_TIMES = 40  # a step of some 20 ms
SAVES = {"cnn": 200}
SAVES_OF_LARGE = 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url")
    parser.add_argument("--saves", type=int)
    parser.add_argument("--states", default="cnn,100,500")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.url, options.saves)))
        return
    found = {name: in_child(name, options) for name in options.states.split(",")}
    print(json.dumps({"torch": torch.__version__, "threads": 1, **found}, indent=1))


def in_child(name: str, options: argparse.Namespace) -> dict:
    count = options.saves or SAVES.get(name, SAVES_OF_LARGE)
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"{folder}/run"
        command = [sys.executable, __file__, "--child", name, "--saves", str(count)]
        done = subprocess.run(
            [*command, "--url", f"{url}-{name}"], check=True, stdout=subprocess.PIPE, text=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, url: str, count: int) -> dict:
    """Measure one kind of state."""
    torch.set_num_threads(1)
    with world.alone(torch.device("cpu")):
        training = Training(name)
        memory = Memory(training)
        ours = Ours(training, url)
        for _ in range(min(count, 5)):
            ours.save()
            while ours.is_busy():
                training.step()
        ours_memory = memory.peak() / training.state_bytes
        others = {
            "torch_save": TorchSave(training, Path(tempfile.mkdtemp(prefix="saves-"))),
            "dcp_async_save": DcpAsyncSave(training, Path(tempfile.mkdtemp(prefix="saves-"))),
            "bare_copy": BareCopy(training),
        }
        variants = {"ours": ours, **others}
        pauses: dict[str, list[float]] = {each: [] for each in variants}
        idle: list[float] = []
        beside: dict[str, list[float]] = {each: [] for each in variants}
        for turn in range(count + 1):  # the first one warms up
            for each, variant in variants.items():
                steps = [training.step() for _ in range(STEPS_BETWEEN)]
                pause = timed(variant.save)
                during = []
                while variant.is_busy():
                    during.append(training.step())
                if turn:
                    idle += steps
                    pauses[each].append(pause)
                    beside[each] += during
        for variant in variants.values():
            variant.close()
    usual = statistics.median(idle)
    return {
        "state_mb": round(training.state_bytes / 1e6, 2),
        "saves": count,
        "step_ms": round(1e3 * usual, 3),
        "pause_ms": {
            each: {
                "median": round(1e3 * statistics.median(taken), 4),
                "p99": round(1e3 * percentile(taken, 0.99), 4),
            }
            for each, taken in pauses.items()
        },
        "beside_percent": {
            each: round(100 * (statistics.median(during) / usual - 1), 1) if during else None
            for each, during in beside.items()
        },
        "beside_steps_p99_ms": {
            "no save": round(1e3 * percentile(idle, 0.99), 3),
            **{
                each: round(1e3 * percentile(during, 0.99), 3)
                for each, during in beside.items()
                if during
            },
        },
        "memory_of_ours": round(ours_memory, 2),
    }


class Training:
    """Steps of one model: work that does not depend on its size, and the real update."""

    def __init__(self, name: str) -> None:
        self.config = Config(save_every_steps=1, keep_last=2)
        torch.manual_seed(0)
        if name == "cnn":
            model = make_model("cnn", image_shape=(1, 28, 28), num_classes=10, dropout=0.1)
            model.to(memory_format=torch.channels_last)
        else:  # weights, momentum and averaged weights: 12 bytes for each parameter
            layers = max(1, round(int(name) * 1e6 / 12 / WIDTH**2))
            model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        settings = settings_of(self.config)
        self.state = TrainState(model, optimizer=self.config.optimizer, settings=settings)
        self.plan = Plan(dataclasses.replace(settings, epochs=10**6), num_samples=60_000)
        self._matrix = torch.randn(WORK_SIZE, WORK_SIZE) / WORK_SIZE**0.5
        self.step()
        self.state_bytes = sum(
            each.numel() * each.element_size() for _, each in self.state._tensors()
        )

    def step(self) -> float:
        """Return the seconds of one step."""
        began = time.perf_counter()
        result = self._matrix
        for _ in range(WORK_TIMES):
            result = result @ self._matrix
        for parameter in self.state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state, step = self.state, self.plan.at(self.state.step)
        buffers = [each.clone() for each in state.buffers]
        state.advance(
            step,
            StepResult(loss=0.0, correct=0, count=step.size, digest=(0, 0), buffers=buffers),
        )
        return time.perf_counter() - began


class Ours:
    """`Saves`, as the training loop uses it."""

    def __init__(self, training: Training, url: str) -> None:
        self._state = training.state
        storage = Place.of(url).storage()
        log = RunLog(storage)

        def make(_: object) -> Attempt:
            return Attempt(
                owner="benchmark",
                world_size=1,
                fingerprint={},
                config={},
                explicit={},
                wanted={},
                num_samples=60_000,
                same_bits=True,
            )

        writer = RunWriter.begin(storage, log, owner="benchmark", make=make)
        self._saves = Saves(
            lambda: writer,
            log,
            training.config,
            training.plan,
            NullProgress(),
            Board.create(),
            retires=True,
        )
        self._saves.prepare(self._state)
        assert self._saves._saver.wait(60)

    def save(self) -> None:
        assert self._saves.wants(self._state.step, ends_epoch=False)
        self._saves.offer(self._state, ends_epoch=False)

    def is_busy(self) -> bool:
        return self._saves._saver.busy

    def close(self) -> None:
        self._saves._collect()
        self._saves.close()


class TorchSave:
    """A synchronous `torch.save` to a new file, durable."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._state, self._folder, self._number = training.state, folder, 0

    def save(self) -> None:
        self._number += 1
        path = self._folder / f"{self._number}.pt"
        with path.open("wb") as file:
            torch.save(self._state.tensors_by_file(), file)
            file.flush()
            os.fsync(file.fileno())
        (self._folder / f"{self._number - 2}.pt").unlink(missing_ok=True)

    def is_busy(self) -> bool:
        return False

    def close(self) -> None:
        shutil.rmtree(self._folder)


class DcpAsyncSave:
    """`torch.distributed.checkpoint.async_save`, until it returns."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._state, self._folder, self._number = training.state, folder, 0
        self._running = None

    def save(self) -> None:
        self._number += 1
        self._running = dcp.async_save(
            self._state.tensors_by_file(), checkpoint_id=self._folder / str(self._number)
        )

    def is_busy(self) -> bool:
        if self._running is None or not self._running.done():
            return self._running is not None
        self._running.result()
        shutil.rmtree(self._folder / str(self._number - 2), ignore_errors=True)
        return False

    def close(self) -> None:
        shutil.rmtree(self._folder)


class BareCopy:
    """One copy of the same tensors into memory that is there."""

    def __init__(self, training: Training) -> None:
        self._state = training.state
        self._places = [torch.empty_like(each) for each in self._sources()]

    def save(self) -> None:
        torch._foreach_copy_(self._places, self._sources())

    def _sources(self) -> list[torch.Tensor]:
        return [t.detach() for f in self._state.tensors_by_file().values() for t in f.values()]

    def is_busy(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Memory:
    """The peak of this process's resident memory, beyond that of training alone."""

    def __init__(self, training: Training) -> None:
        self._begin()
        for _ in range(STEPS_BETWEEN):
            training.step()
        self._training = self._peak()
        self._begin()

    def peak(self) -> int:
        return self._peak() - self._training

    @staticmethod
    def _begin() -> None:
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
