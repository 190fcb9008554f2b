"""How many steps a run has, which pairs each of them trains, and how much of the run is done.

`epochs` are passes over the pairs, whatever the batch size; `max_steps` counts steps. A resumed run may have another
batch size than before. So everything is counted from the position at which this process started.

The share of the run that is done is the larger of two: passes over the data out of `epochs`, and steps out of
`max_steps`. Neither depends on the batch size, so a change of the batch size neither restarts the learning rate's
schedule nor sets it back. Without a change, the share is steps done out of all steps.
"""

from dataclasses import dataclass
from typing import NamedTuple

from babybert.checkpoint.format import TrainState
from babybert.data.epoch_order import BatchSpan, batches_of, pairs_in_spans


class Position(NamedTuple):
    """The next batch: number `batch` of epoch `epoch`, counted from 0, after `earlier_spans` of this epoch."""

    epoch: int
    batch: int
    earlier_spans: list[BatchSpan]


@dataclass(frozen=True)
class TrainingPlan:
    """The steps of a run from `start` on.

    Attributes:
        pairs: pairs of an epoch.
        batch_size: pairs of a step.
        epochs: passes over the pairs; the run ends after them, or earlier after `max_steps`.
        max_steps: steps of the whole run, those before `start` included; None does not limit them.
        start: where this process begins. It must not change.
    """

    pairs: int
    batch_size: int
    epochs: int
    max_steps: int | None
    start: TrainState

    def batches_in_epoch(self, earlier_spans: list[BatchSpan] | None = None) -> int:
        """Steps of an epoch after its `earlier_spans`; the last batch may be smaller."""
        return batches_of(self.pairs - pairs_in_spans(earlier_spans or []), self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: those done before `start`, and those that are left."""
        epochs_left = self.epochs - self.start.epoch
        steps = self.start.step
        if epochs_left > 0:
            steps += self._batches_left_at_start + (epochs_left - 1) * self.batches_in_epoch()
        return min(steps, self.max_steps) if self.max_steps else steps

    @property
    def total_pairs(self) -> int:
        """Pairs of all steps of the run. An epoch's pairs count in each epoch."""
        return self.pairs_before(max(self.total_steps, self.start.step))

    @property
    def _batches_left_at_start(self) -> int:
        return self.batches_in_epoch(self.start.earlier_spans) - self.start.batch

    def position(self, step: int) -> Position:
        """The batch of step `step`, which is counted from 0 and not before `start`."""
        steps = step - self.start.step
        assert steps >= 0, "the plan begins at `start`"
        if steps < self._batches_left_at_start:
            return Position(self.start.epoch, self.start.batch + steps, self.start.earlier_spans)
        epochs, batch = divmod(steps - self._batches_left_at_start, self.batches_in_epoch())
        return Position(self.start.epoch + 1 + epochs, batch, [])

    def pairs_before(self, step: int) -> int:
        """Pairs of all steps before `step`."""
        position = self.position(step)
        in_epoch = pairs_in_spans(position.earlier_spans) + position.batch * self.batch_size
        return position.epoch * self.pairs + in_epoch

    def pairs_of(self, step: int) -> int:
        """Pairs of step `step`; the last batch of an epoch may be smaller."""
        return self.pairs_before(step + 1) - self.pairs_before(step)

    def schedule_step(self, step: int) -> tuple[float, int]:
        """Where step `step` is in the schedule: the first two arguments of `learning_rate`.

        Without a change of the batch size, these are the step and the number of steps. After a change, they are those
        of a run that had the present batch size from its start. In the epoch of the change, the pairs that came before
        count as the steps that they would have made, which need not be a whole number.
        """
        epoch, batch, earlier_spans = self.position(step)
        epoch_steps, steps_left = self.batches_in_epoch(), self.batches_in_epoch(earlier_spans)
        pairs_left = self.pairs - pairs_in_spans(earlier_spans)
        # One division of whole numbers: without a change, the result is exact.
        done_in_epoch = epoch_steps - (steps_left - batch) * pairs_left * epoch_steps / (steps_left * self.pairs)
        by_epochs = (epoch * epoch_steps + done_in_epoch, self.epochs * epoch_steps)
        if not self.max_steps:
            return by_epochs
        return max(by_epochs, (step, self.max_steps), key=lambda done: (done[0] / done[1], -done[1]))

    def share_done(self, step: int) -> float:
        """The share of the run that the steps before `step` are, from 0 to 1."""
        done, total = self.schedule_step(step)
        return done / total
