"""Requests to replicas of this and other nodes: batched, counted to a quorum."""
