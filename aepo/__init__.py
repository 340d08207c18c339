"""Analytic Energy-Guided Policy Optimization (arXiv 2505.01822): the method, without a scheduler or a tracker.

Importing this package loads neither torch nor an environment; its modules do, when they are asked for.
"""

from importlib.metadata import version

__version__ = version("aepo-platform")

__all__ = ["__version__"]
