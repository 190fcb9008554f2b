"""The learning rate of each step: linear warm-up, then linear decay to zero (Devlin et al., 2019, appendix A.2).

Or, after the warm-up, half of a cosine's wave down to zero (Loshchilov and Hutter, 2017), or no decay. A function
of the step, with no state of its own: after a resume there is nothing to restore.
"""

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup_fraction: float, schedule: str = "linear") -> float:
    """The rate of step `step` (0 is the first) of `total_steps`, by "linear", "cosine" or "constant" decay."""
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    left = (total_steps - step) / max(total_steps - warmup_steps, 1)
    return peak * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[schedule]
