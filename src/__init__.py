NAME = "Assay"
VERSION = "0.2.0"
