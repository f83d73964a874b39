"""The handlers of S3's operations, one module for each kind of resource, on the ports of ``objects.api``."""
