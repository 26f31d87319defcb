"""The command `assay`, also as `python -m assay`."""

import sys

try:
    from .core.main import console
except ModuleNotFoundError as error:
    if error.name != "assay.core":
        raise
    from src.main import console

if __name__ == "__main__":
    sys.exit(console())
