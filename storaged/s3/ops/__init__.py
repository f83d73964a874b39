"""The handlers of S3's operations, by what they do, on the ports of ``objects.api``."""
