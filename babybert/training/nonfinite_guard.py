"""Stops a run at a non-finite loss (NaN or infinity), without making a GPU wait in every step."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from babybert.errors import UserError

ROWS_SHOWN = 8


class NonFiniteGuard:
    """Records the first step with a non-finite gradient. A non-finite loss gives one, so gradients are enough.

    The record stays on the device. `check` reads it, which waits for the device: the loop calls it where it reads the
    loss anyway, and before every save, so that no checkpoint holds the result of such a step.
    """

    def __init__(
        self, device: torch.device, rows_of: Callable[[int], np.ndarray], on_nonfinite: Callable[[int], None]
    ) -> None:
        self._first_step = torch.full((), -1, device=device)
        self._rows_of = rows_of  # the rows of the training table in the batch of a step
        self._on_nonfinite = on_nonfinite  # called with the number of steps done, before the error is raised

    def record(self, gradient_norm: Tensor, step: int) -> None:
        """Record the gradient norm (scalar) of step `step`, counted from 0. On a CPU, `check` at once."""
        is_first = (self._first_step < 0) & ~gradient_norm.isfinite()
        self._first_step = torch.where(is_first, step, self._first_step)
        if self._first_step.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise UserError, naming the step and the rows of its batch, if any gradient was not finite."""
        step = int(self._first_step.item())
        if step < 0:
            return
        self._on_nonfinite(step + 1)
        raise UserError(
            f"non-finite loss or gradient (NaN or infinity) at step {step + 1} (rows {self._describe_rows(step)} of "
            "the training table, counted from 0); the last checkpoint is valid: resume from it with a lower --lr"
        )

    def _describe_rows(self, step: int) -> str:
        rows = self._rows_of(step)
        text = ", ".join(map(str, rows[:ROWS_SHOWN]))
        return f"{text} and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else text
