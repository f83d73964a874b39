"""Histories of one disk that end in power cuts, and what must be there afterwards. ``python -m tests.power_cuts``."""
