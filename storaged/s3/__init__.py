"""The S3 front: HTTP in, objects out. Signatures and XML are pure; the handlers are small."""
