"""Lets the processes of a test accept layouts that move data: the test puts this folder on PYTHONPATH."""

from __future__ import annotations

from storaged.cluster import moves

moves.MOVING_SUPPORTED = True
