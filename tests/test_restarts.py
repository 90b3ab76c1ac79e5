"""torchrun's restarts: the trap of its shared store, and what is said where there are none."""

from pathlib import Path

from in_process import small_run
from jobs import Job, show, wait_for_step

FLAGS = ["--batch-size=256", "--save-every-steps=5", "--max-steps=26", "--eval-every-epochs=99"]


def test_workers_killed_again_and_again_meet_again_under_plain_torchrun(tmp_path: Path) -> None:
    """Stock workers hang here in most cases: they find dead addresses in the launcher's store."""
    job = Job(tmp_path / "run", FLAGS, module="train_small").start()
    for kill, step in enumerate((4, 12, 20)):
        wait_for_step(job, step, attempt=kill)
        job.kill_worker(kill % 2)
    text = job.finish()
    story = show(job.run)
    assert len(story["attempts"]) == 4
    assert len({each["owner"] for each in story["attempts"]}) == 1  # the launch, not its attempts
    assert [each["lost_steps"] for each in story["attempts"]] == [0, 0, 0, 0]  # survivors saved
    assert text.count(" resumed ") == 3


def test_a_launcher_without_restarts_is_warned_about(tmp_path: Path) -> None:
    with small_run(tmp_path) as run:
        none = run.launch("--max-steps=1", environ={"TORCHELASTIC_MAX_RESTARTS": "0"})
        some = run.launch("--max-steps=2", environ={"TORCHELASTIC_MAX_RESTARTS": "3"})
    assert len(none.saying("--max-restarts")) == 1
    assert some.saying("--max-restarts") == []
