"""Plays histories of one disk that end in power cuts, and checks what is there afterwards:
``python -m tests.power_cuts``.
"""
