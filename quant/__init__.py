"""INT8 versions of PaddleOCR / PaddleX models: recipes, plans, exporters, command line.

In Python: `from quant import load_recipe, quantize, evaluate`; see `quant.api` and docs/api.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.api import evaluate, load_recipe, quantize

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_recipe", "quantize"]


def __getattr__(name: str) -> Any:
    """The functions of `quant.api`, imported when they are asked for: the command line must start at once."""
    if name not in __all__:
        raise AttributeError(f"module 'quant' has no attribute '{name}'")
    from quant import api

    return getattr(api, name)
