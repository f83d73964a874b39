"""Registers of the system table: buckets, users, and what authenticates them."""
