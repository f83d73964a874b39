"""HTTP/1.1 of the S3 port: grammar, connections, bodies, limits. It knows nothing of S3's operations."""
