"""storaged: a distributed, S3-compatible object store whose data and keys stay under EU law."""

__version__ = "0.1.0"
