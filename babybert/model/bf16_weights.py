"""Copies of a model's fp32 parameters in bf16, for products on a CPU's matrix units."""

from torch import Tensor, bfloat16


class Bf16Weights:
    """Makes each copy once. It is for one step, within which parameters do not change."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the parameter's id: the parameter and its copy

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter in bf16, without a gradient."""
        if id(parameter) not in self._copies:
            self._copies[id(parameter)] = (parameter, parameter.detach().to(bfloat16))
        return self._copies[id(parameter)][1]
