"""The learning rate of each step: linear warm-up, then linear decay to zero (Devlin et al., 2019, appendix A.2).

A function of the step, with no state of its own: after a resume there is nothing to restore.
"""


def learning_rate(step: int, total_steps: int, peak: float, warmup_fraction: float) -> float:
    """The rate of step `step` (0 is the first) of `total_steps`."""
    warmup_steps = round(total_steps * warmup_fraction)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (total_steps - step) / max(total_steps - warmup_steps, 1)
