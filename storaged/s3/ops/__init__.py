"""The operations of S3, on the ports of ``objects.api``."""
