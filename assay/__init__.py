"""Assay in Python: `from assay import train, evaluate`; see docs/python.md.

In an installed package the code is `assay.core`, in a checkout it is `src`.
"""

try:
    from .core.api import *  # noqa: F403
    from .core.api import __all__, __version__
except ModuleNotFoundError as error:
    if error.name != "assay.core":
        raise
    from src.api import *  # noqa: F403
    from src.api import __all__, __version__  # noqa: F401
