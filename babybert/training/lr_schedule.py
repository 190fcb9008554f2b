"""The learning rate of each step: linear warm-up, then linear decay to zero (Devlin et al., 2019, appendix A.2).

Alternatives after the warm-up are a cosine decay to zero (Loshchilov and Hutter, 2017) and no decay. The rate is a
function of the step and has no state, so a resume has nothing to restore. After a resume with another batch size, the
step is that of a run which always had this batch size (see `TrainingPlan.schedule_step`).
"""

import math


def learning_rate(
    step: float, total_steps: int, peak: float, warmup_fraction: float, schedule: str = "linear"
) -> float:
    """The learning rate of step `step` (the first is 0) of `total_steps`.

    Args:
        step: a whole number, except in an epoch in which the batch size changed.
        total_steps: steps of the whole run.
        peak: the rate at the end of the warm-up.
        warmup_fraction: the share of the steps in which the rate rises linearly to the peak.
        schedule: the decay after it, "linear", "cosine" or "constant".
    """
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return peak * min(step + 1, warmup_steps) / warmup_steps
    remaining = (total_steps - step) / max(total_steps - warmup_steps, 1)  # from 1 down to 0
    if schedule == "linear":
        return peak * remaining
    if schedule == "cosine":
        return peak * (0.5 - 0.5 * math.cos(math.pi * remaining))
    assert schedule == "constant", schedule
    return peak
