"""The version of the package, alone in its module so that packaging reads it without importing anything."""

__version__ = "0.1.0"
