"""How the range of an activation moves while a network is trained: its zero point stays, its step may change.

* `lsq`: the step is learned from what is rounded and what is clipped (Esser et al., "Learned Step Size Quantization",
  2020, section 2.1).
* `pact`: the bound is learned, from what is clipped alone (Choi et al., "PACT: Parameterized Clipping Activation for
  Quantized Neural Networks", 2018, section 3). There the bound begins far out and a decay pulls it in; a plan's bound
  comes from calibration, so nothing pulls at it.
* `moving_average`: nothing is learned; the step follows an exponential average of what the batches span (Jacob et al.,
  "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.1).

Bounds are in steps from the zero point, which is 0 on this scale and so always a step: `low <= 0 <= high`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quant.kernels import straight_round
from quant.recipe import Quantizers

LARGEST_GROWTH = 2.0
"""Times its step that a batch counts for at most: an outlier must not blank a range."""


def learned_step(values: Any, step: Any, low: float, high: float) -> Any:
    """Values in whole steps; the step's gradient is of what is rounded and what is clipped."""
    return straight_round((values / step).clip(low, high)) * step


def learned_bound(values: Any, step: Any, low: float, high: float) -> Any:
    """Values in whole steps; the step's gradient is of what is clipped."""
    fixed = step.detach()
    bounded = values.maximum(low * step).minimum(high * step)
    return straight_round(bounded / fixed) * fixed


ROUNDINGS: dict[Quantizers, Callable[[Any, Any, float, float], Any]] = {
    "lsq": learned_step,
    "pact": learned_bound,
    "moving_average": learned_step,
}


def spanning_step(values: Any, low: float, high: float) -> float:
    """The least step at which no value is clipped; 0 where none lies on a side that has bounds."""
    above = float(values.amax()) / high if high else 0.0
    below = float(values.amin()) / low if low else 0.0
    return max(above, below, 0.0)


def followed(step: float, spanned: float, momentum: float) -> float:
    """The moving average after one more batch; of one that shows nothing it stays as it is."""
    return momentum * step + (1 - momentum) * min(spanned, LARGEST_GROWTH * step) if spanned else step
