"""The version, where every floor can read it."""

__version__ = "1.0.0.dev0"
