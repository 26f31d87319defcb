"""Assay: the name, the version and the module of the command line."""

NAME = "Assay"
VERSION = "0.2.0"
MAIN = f"{__name__}.main"  # `python -m MAIN`: the package is src in a checkout
