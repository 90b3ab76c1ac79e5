"""One trainer process: goes from generation to generation until the run is at its end."""

import math
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fmnist_dist import limits, loop
from fmnist_dist.build import make_evaluation
from fmnist_dist.checkpoint.disk import disk_from
from fmnist_dist.data.split import Batch
from fmnist_dist.desk import Desk, Prepared
from fmnist_dist.distributed import generation, share, world
from fmnist_dist.distributed.comparison import Comparison
from fmnist_dist.distributed.connection import StoreLostError
from fmnist_dist.distributed.generation import Arrival, Meeting, PeersLeftError
from fmnist_dist.distributed.roster import StoreKeys
from fmnist_dist.distributed.step import Outcome, ShardedStep
from fmnist_dist.distributed.stop import StopRequest
from fmnist_dist.distributed.transfer import TornStateError
from fmnist_dist.distributed.world import World
from fmnist_dist.errors import Drained, PeerLostError, TransientError
from fmnist_dist.handover.board import Section
from fmnist_dist.handover.kept import KeptCopy
from fmnist_dist.healing import Healing
from fmnist_dist.held import Held, hold, inherit, open_hint
from fmnist_dist.lookout import Lookout
from fmnist_dist.opening import open_run
from fmnist_dist.plan import Step
from fmnist_dist.telemetry import events
from fmnist_dist.telemetry.events import EventLog

_events = EventLog("fmnist_dist.trainer")


class Trainer:
    """What one process does from its start to its end, and holds meanwhile."""

    def __init__(
        self, prepared: Prepared, desk: Desk, stopping: StopRequest, lookout: Lookout
    ) -> None:
        self._prepared = prepared
        self._config = prepared.launch.config  # of this launch; the run's own is in `Held`
        self._roster = prepared.roster
        self._desk = desk
        self._board = desk.board
        self._stop = stopping
        self._lookout = lookout
        self._incarnation = secrets.token_hex(8)
        self._device = world.device_of(self._config.device, local_rank=self._roster.local_rank)
        self._store = self._roster.connect()
        self._keys = StoreKeys(self._store)
        # Connections of their own: each is for one thread.
        self._lookout_keys = StoreKeys(self._roster.connect())
        self._saver_keys = StoreKeys(self._roster.connect())
        self._kept = KeptCopy(desk.slots, warn=_events.warning)
        self._healing = Healing(desk.lost, died_at=desk.died_at)
        self._held = inherit(prepared, desk, self._device)

    def train(self) -> None:
        """Train to the end of the run, meeting anew whenever a peer is lost."""
        try:
            self._train()
        except StoreLostError as error:
            held = self._held
            if held is not None and held.saves.is_finished(held.state.step):
                return  # rank 0 was done, and its launcher with it
            raise self._alone(str(error)) from error

    def _train(self) -> None:
        best, moved_at = -2, 0.0  # the state's position, and when a generation last moved it
        while (meeting := self._meet()) is not None:
            try:
                self._join(meeting)
            except (PeerLostError, TornStateError) as error:
                _events.info("meeting again", why=str(error), generation=meeting.generation)
                position = self._held.state.position if self._held is not None else -1
                if position > best:
                    best, moved_at = position, time.monotonic()
                elif time.monotonic() - moved_at > limits.REGROUP_SECONDS:
                    raise self._alone(
                        f"no step in {limits.REGROUP_SECONDS:g} s: {error}"
                    ) from error
            except loop.RollbackError as error:
                self._roll_back(error)
                best = -2
            else:
                return
            generation.move(self._keys, failed=meeting.generation)

    def close(self) -> None:
        if self._held is not None:
            self._held.close()

    def _meet(self) -> Meeting | None:
        """Return who has come, once all have; None when there is nothing left to do.

        Whoever waits too long, or is asked to stop, leaves its state durable and raises.
        """
        self._board.enter(Section.MEETING)
        began = looked = time.monotonic()
        is_early = self._held is None and self._board.generation == 0
        limit = limits.FIRST_MEETING_SECONDS if is_early else limits.MEETING_SECONDS

        def pause() -> None:
            nonlocal looked
            now = time.monotonic()
            if self._stop.requested:
                raise Drained(self._secure("drain", self._lookout.drain_seconds_left()))
            if self._held is not None and now - max(looked, began) > limits.EARLY_SAVE_SECONDS:
                looked = now
                _events.info("waiting for lost ranks", done=self._secure("survivor", limit))
                if self._held.saves.is_finished(self._held.state.step):
                    raise PeersLeftError({})
            if now - began > limit:
                raise self._alone(f"no word of the other ranks for {limit:g} s")
            time.sleep(limits.poll_seconds(now - began))

        def announce(number: int) -> None:
            self._board.generation = number

        arrival = Arrival(
            rank=self._roster.rank,
            incarnation=self._incarnation,
            step=self._held.state.position if self._held else -1,
            digest=self._held.state.digest() if self._held else "",
            lost=self._healing.lost,
        )
        meet = self._prepared.faults.wrap("meeting", generation.meet)
        try:
            return meet(
                self._keys, size=self._roster.size, arrival=arrival, announce=announce, pause=pause
            )
        except PeersLeftError as left:
            held = self._held
            if held is not None and held.saves.is_finished(held.state.step):
                return None
            raise self._alone(str(left)) from left

    def _alone(self, why: str) -> PeerLostError | TransientError:
        """Save for the others too, and return the error to end with."""
        if self._held is None:
            return TransientError(f"the ranks did not meet: {why}")
        done = self._secure("survivor", self._lookout.drain_seconds_left())
        return PeerLostError(f"{why}; {done}, all ranks have to start again")

    def _secure(self, reason: str, seconds: float) -> str:
        """Have the state saved, by whoever; return what was done, for people."""
        held = self._held
        if held is None:
            return "asked to stop before the first step: there is nothing to save"
        try:
            held.saves.precede = sum(
                generation.has_arrived(self._keys, generation=self._board.generation, rank=rank)
                for rank in range(self._roster.rank)
            )
        except StoreLostError:  # nobody knows who is left
            held.saves.precede = self._roster.rank
        held.saves.secure(held.state, reason=reason, seconds=seconds)
        return f"step {held.state.step} is saved, the same command goes on"

    def _secure_alone(self, seconds: float) -> str:
        """Save in the lookout's thread, while the main one is stuck: ask nobody."""
        held = self._held
        if held is None:
            return "there is nothing to save"
        held.saves.insist(held.state, reason="drain", seconds=seconds)
        return f"step {held.state.step} is saved, the same command goes on"

    def _hand_over(self) -> bool:
        """Leave the state as it is with the keeper, in the lookout's thread; False without one."""
        held = self._held
        if held is None:
            return False
        with held.state.still():
            return self._kept.keep_now(held.state.position, held.state.image)

    def _join(self, meeting: Meeting) -> None:
        """Train in one generation. Raises `PeerLostError` when it fails."""

        def has_failed() -> bool:
            try:
                return generation.number(self._lookout_keys) != meeting.generation
            except StoreLostError:
                return True

        def check() -> None:
            if generation.number(self._keys) != meeting.generation:
                raise PeerLostError("another rank has died")
            if generation.left(self._keys):
                raise PeerLostError("another rank has left")
            if self._stop.requested and not self._board.section == Section.FINISH:
                raise PeerLostError("this rank was asked to stop")

        with (
            world.naming_lost_peers(),
            self._out_afterwards(),
            world.join(
                self._roster,
                self._store,
                device=self._device,
                generation=meeting.generation,
                check=check,
            ) as joined,
            self._lookout.watching(joined, has_failed),
        ):
            if self._desk.phases is not None:
                self._desk.phases.ended("rendezvous")
            try:
                self._train_in(joined, meeting)
            except BaseException:
                joined.break_off()  # the others need not wait until theirs fails too
                raise
            finally:
                self._board.enter(Section.LEAVE)

    @contextmanager
    def _out_afterwards(self) -> Iterator[None]:
        """Note that the group is down, which gloo may not let happen: see `lookout`."""
        try:
            yield
        finally:
            self._board.enter(Section.DONE)

    def _train_in(self, joined: World, meeting: Meeting) -> None:
        held = self._agree(joined, meeting)
        if held is None:
            return
        faults, board, config = self._prepared.faults, self._board, held.config
        self._kept.keep_now(held.state.position, held.state.image)
        board.collectives = 0  # keepers compare them within one generation

        def before_waiting() -> None:
            board.collectives += 1
            board.enter(Section.COLLECTIVE)

        def gather(step: Step, start: int, stop_at: int) -> Batch:
            board.enter(Section.DATA)
            batch = held.feed(step, start, stop_at)
            board.enter(Section.COMPUTE)
            return batch

        step = ShardedStep(
            held.state,
            joined,
            logical_shards=config.logical_shards,
            precision=config.precision,
            seed=config.seed,
            before_waiting=faults.wrap("collective", before_waiting),
        )
        evaluate = make_evaluation(
            config, self._prepared.dataset, joined, held.state, before_waiting=before_waiting
        )

        def finished() -> None:
            board.finished = True

        run_step = faults.wrap("forward", step.__call__, spoil={"nan": _without_loss})
        self._say_start(held, joined)
        phases, self._desk.phases = self._desk.phases, None
        try:
            loop.train(
                loop.Parts(
                    plan=held.plan,
                    state=held.state,
                    step=phases.time_first(run_step) if phases else run_step,
                    gather=faults.wrap("data", gather),
                    commit=faults.wrap(
                        "update",
                        held.state.advance,
                        spoil={"corrupt": lambda _: _flip_a_bit(held.state.model)},
                    ),
                    evaluate=faults.wrap("evaluate", evaluate),
                    agree=lambda digest, step: share.require_equal(joined, digest, step=step),
                    comparison=self._comparison(joined, meeting),
                    progress=held.progress,
                    stop=self._stop,
                    board=board,
                    kept=self._kept,
                    saves=held.saves,
                    hint=held.hint,
                    is_main=joined.is_main,
                    stepped=self._healing.recorder(
                        meeting, held.saves, step=held.state.step, is_main=joined.is_main
                    ),
                    finished=faults.wrap("finish", finished),
                    peers_are_there=joined.check_peers,
                    eval_every_epochs=self._config.eval_every_epochs,
                    max_steps=self._config.max_steps,
                    drain_seconds_left=self._lookout.drain_seconds_left,
                    finish_seconds=self._config.max_unsaved_seconds,
                )
            )
        finally:
            step.close()
        held.progress.close()  # its last line comes before the verdict
        if joined.is_main:
            metrics = held.state.metrics
            shown = {n: round(metrics[n], 4) for n in ("test_accuracy",) if n in metrics}
            _events.info("finished", run=str(self._prepared.place), step=held.state.step, **shown)

    def _comparison(self, joined: World, meeting: Meeting) -> Comparison | None:
        if joined.size == 1:
            return None
        return Comparison(
            self._saver_keys, generation=meeting.generation, rank=joined.rank, size=joined.size
        )

    def _agree(self, joined: World, meeting: Meeting) -> Held | None:
        """Open the run and hold the state that all hold; None when nothing is left to do."""
        source, board, faults = meeting.source, self._board, self._prepared.faults
        board.enter(Section.RESTORE)
        if source is not None:
            _refuse_different(meeting)
        found = faults.wrap("open", open_run)(
            self._prepared.launch,
            joined,
            self._prepared.place,
            disk=disk_from(self._prepared.faults.disk),
            agents=self._roster.agents,
            num_samples=self._prepared.num_samples,
            known=board.resumption if source is not None else None,
            suspect=self._desk.suspect or _number(self._keys.get("suspect")),
        )
        if found is None:
            if joined.is_main:
                _events.info(
                    "already finished",
                    run=str(self._prepared.place),
                    to_train_on="raise --epochs or --max-steps",
                )
            board.finished = True
            return None
        board.resumption = found.resumption.to_json()
        if source is None or self._held is None:
            self.close()
            self._held = hold(self._prepared, board, found, joined.device)
            if source is None and found.files:
                board.restoring = -1 if found.resumption.parent is None else found.resumption.parent
                faults.wrap("restore", found.resumption.restore)(self._held.state, found.files)
        held = self._held
        if source is not None and meeting.behind():
            image = b"".join(held.state.image()) if joined.rank == source else None
            received = share.broadcast(joined, image, source=source, key="state")
            if joined.rank in meeting.behind():
                held.state.load_image(received)
        if joined.is_main and held.hint is None:
            held.hint = open_hint(self._prepared, held)
        held.saves.precede = joined.rank
        self._lookout.secure_with(self._secure_alone)
        self._lookout.hand_over_with(self._hand_over)
        if self._desk.phases is not None:
            self._desk.phases.ended("restore")
        return held

    def _roll_back(self, error: loop.RollbackError) -> None:
        """Cut the line before a step without a loss, and forget the state."""
        held = self._held
        assert held is not None
        self._held = None
        self._board.enter(Section.SAVE)
        if self._desk.slots is not None:
            self._desk.slots.clear()
        try:
            if self._roster.rank == 0:
                held.saves.roll_back(bad_step=error.bad_step, why=str(error))
        finally:
            held.close()

    def _say_start(self, held: Held, joined: World) -> None:
        events.set_context(attempt=held.resumption.attempt)
        if not joined.is_main:
            return
        last_step = min(held.plan.total_steps, self._config.max_steps or held.plan.total_steps)
        _events.info(
            "training" if self._desk.phases is not None else "training goes on",
            run=str(self._prepared.place),
            attempt=held.resumption.attempt,
            model=held.config.model,
            dataset=held.config.dataset,
            workers=joined.size,
            logical_shards=held.config.logical_shards,
            device=joined.device.type,
            keeper="no" if self._desk.slots is None else "yes",
            from_step=held.state.step,
            to_step=last_step,
        )


def _without_loss(outcome: Outcome) -> Outcome:
    """What an armed `forward:nan` makes of a step."""
    return replace(outcome, result=replace(outcome.result, loss=math.nan))


@torch.no_grad()
def _flip_a_bit(model: torch.nn.Module) -> None:
    """What an armed `update:corrupt` does to the weights: what faulty memory does."""
    parameter = next(model.parameters())
    parameter.view(-1)[0:1].view(torch.int32).bitwise_xor_(1)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _refuse_different(meeting: Meeting) -> None:
    assert meeting.source is not None
    position = meeting.arrivals[meeting.source].step
    share.refuse_different(
        {each.rank: each.digest for each in meeting.arrivals if each.step == position},
        step=position // 2,
    )
