"""HTTP/1.1 as the S3 front speaks it: grammar, connections, bodies, answers, limits."""
