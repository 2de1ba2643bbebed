"""INT8 versions of PaddleOCR / PaddleX models: recipes, plans, exporters, command line."""

__version__ = "0.1.0"
