"""foretaste: deep-learning recommendation, from a table of events to served answers."""

__version__ = "0.1.0"
