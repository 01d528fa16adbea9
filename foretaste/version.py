"""The version of foretaste: a leaf, so that every room may write it into what it keeps."""

__version__ = "0.1.0"
