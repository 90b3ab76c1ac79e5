"""What an attempt finds out about its machine and its run when it takes over.

On a disk, and on a real S3 server.
"""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from in_process import small_run
from run_files import Folder, bodies, log_of

from fmnist_dist import opening
from fmnist_dist.checkpoint.place import Place
from fmnist_dist.checkpoint.record import Attempt
from fmnist_dist.errors import IncompatibleError, PeerLostError


def test_another_instruction_set_warns_and_is_recorded_but_never_refused(
    root: Folder, tmp_path: Path
) -> None:
    with small_run(tmp_path, root) as run:
        assert run.launch("--max-steps=2").code == 0
        assert log_of(run.root).read().head.same_bits
        elsewhere = {"torch": "2.99.0", "instruction_set": "SVE512", "cpu_flags": "", "device": "x"}
        with mock.patch.object(opening, "fingerprint", return_value=elsewhere):
            ended = run.launch("--max-steps=4")
        assert ended.code == 0
        (warning,) = ended.saying("other bits")
        assert "SVE512" in warning
        assert not log_of(run.root).read().head.same_bits

        # It stays false when the run comes back to the first machine: the bits are mixed for good.
        assert run.launch("--max-steps=6").code == 0
        assert not log_of(run.root).read().head.same_bits
        assert [body.same_bits for body in bodies(run.root, Attempt)] == [True, False, False]


def test_a_resumed_run_says_from_where_and_what_was_lost_in_one_line(
    root: Folder, tmp_path: Path
) -> None:
    with small_run(tmp_path, root) as run:
        assert run.launch("--max-steps=3").saying(" resumed ") == []
        (line,) = run.launch("--max-steps=5").saying(" resumed ")
        assert 'checkpoint="step 3"' in line
        assert "attempt=2" in line
        assert "lost_steps=0" in line


def test_a_checkpoint_record_names_the_attempt_before_as_swept(
    root: Folder, tmp_path: Path
) -> None:
    with small_run(tmp_path, root) as run:
        for last in (2, 4, 6):
            assert run.launch(f"--max-steps={last}").code == 0
        assert log_of(run.root).read().head.swept == 2


class Left:
    """A world in which the other rank has left, as whoever waits for it finds out."""

    size = 2

    def __init__(self, told: dict[str, bytes]) -> None:
        self.store = SimpleNamespace(check=lambda keys: keys[0] in told, get=told.__getitem__)

    def hear(self, key: str) -> str:
        raise PeerLostError("another rank has left")


def test_a_rank_that_sees_no_run_is_heard_though_it_has_left_meanwhile(tmp_path: Path) -> None:
    place = Place.of(str(tmp_path / "run"))
    with pytest.raises(IncompatibleError, match="rank 1 does not see what this node has written"):
        opening._check_seen(Left({"sees/1": b"no"}), place)
    opening._check_seen(Left({"sees/1": b"yes"}), place)
    with pytest.raises(PeerLostError):
        opening._check_seen(Left({}), place)
