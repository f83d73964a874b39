"""Benchmarks: an S3 load generator, rows of work, and the servers that they measure. See benches/README.md."""
