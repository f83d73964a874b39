"""Benchmarks: an S3 load generator of its own, rows of work, and the servers they are run against. See README.md."""
