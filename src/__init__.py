NAME = "Assay"
VERSION = "0.1.0"
