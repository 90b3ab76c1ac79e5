"""P4 on S3: a launch that is frozen while a request of its is under way, replaced, and continued.

The proxy holds the request. In the end it reaches the store, or it does not: both happen to
requests that are under way when their sender is stopped.
"""

import os
import signal
from pathlib import Path

import pytest
from alone import Alone
from faulty_proxy import Fault, FaultyProxy
from frozen_child import state
from jobs import wait_for
from plain_s3 import PlainStorage
from run_files import assert_sound, kinds, log_of
from seaweed import Seaweed, s3_environ

from fmnist_dist.checkpoint.sweep import prune
from fmnist_dist.errors import ExitCode

FLAGS = ("--save-every-steps=2", "--keep-last=1")
# Method and target of the request, and how many such there are before it.
POINTS = {
    "taking the run over": ("PUT", "/log/0", 0),
    "reading the log": ("GET", "/log/", 0),
    "a file of a save": ("PUT", "/optimizer", 1),
    "the record of a save": ("PUT", "/log/0+3", 0),
    "the record of a retirement": ("PUT", "/log/0+2", 0),
    "deleting what is retired": ("POST", r"\?delete$", 0),
}
OTHERS = [point for point in POINTS if point != "the record of a save"]
SHORT = "STORAGE_SILENCE_SECONDS=1"  # so soon the frozen one finds that there is no answer


@pytest.mark.parametrize("kind", ["late", pytest.param("stalled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "point",
    ["the record of a save", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)],
)
def test_a_launch_that_was_frozen_in_a_request_neither_commits_nor_deletes(
    proxied_url: str,
    seaweed: Seaweed,
    s3_proxy: FaultyProxy,
    tmp_path: Path,
    point: str,
    kind: str,
) -> None:
    stored = PlainStorage(seaweed, proxied_url)
    method, target, skip = POINTS[point]
    held = s3_proxy.add(Fault(kind, method, target, skip=skip))
    environ = {"FMNIST_DIST_NO_KEEPER": "true", "TRAIN_SMALL_LIMITS": SHORT}
    with Alone(proxied_url, *FLAGS, "--max-steps=8", logs=tmp_path, **environ) as frozen:
        wait_for(lambda: held.happened, f"{point} under way")
        os.kill(frozen.process.pid, signal.SIGSTOP)
        wait_for(lambda: state(frozen.process.pid) == "T", "it to be stopped")
        stood = kinds(stored)
        other = {**environ, **s3_environ(seaweed.endpoint)}
        logs = tmp_path / "other"
        logs.mkdir()
        code, text = Alone(proxied_url, *FLAGS, "--max-steps=12", logs=logs, **other).end()
        assert code == 0, text[-3000:]
        before = seaweed.objects(proxied_url)
        os.kill(frozen.process.pid, signal.SIGCONT)
        code, text = frozen.end()
    s3_proxy.clear()
    s3_proxy.settle()
    assert held.happened == 1
    assert_sound(stored)
    after = seaweed.objects(proxied_url)
    if "attempt" not in stood:  # it comes as the newer one, and finds the run finished
        assert code == 0, text[-3000:]
        return
    assert before.items() <= after.items()
    assert code == ExitCode.FENCED, text[-3000:]
    assert "attempt 2 has taken this run over: attempt 1 stops here" in text
    new = after.keys() - before.keys()
    if (point, kind) == ("a file of a save", "late"):
        # Whoever sent it takes it back, unless it comes later than that: then `runs prune` does.
        assert all("/optimizer" in path for path in new)
        log = log_of(stored)
        prune(stored, log, log.read().head)
        new &= seaweed.objects(proxied_url).keys()
    assert not new
