"""The S3 front: HTTP in, objects out. Signatures and XML are pure; the handlers are small.

The way of a request, and the module that has each step:

    http        the grammar of HTTP/1.1 (pure)           connection sockets, time limits
    app         the order of all that follows
    request     target, bucket, key: bytes, never normalised
    auth        sigv4 (pure), chunked: who asks, and what the body must prove
    routes      which operation, a row                   aws        every header and parameter that AWS's documentation
    names
    context     may they use this bucket?
    operations  what the row takes: parameters, headers, kind of body; all else that AWS names is refused
    conditions  If-Match and its relatives, as typed values
    buckets, listing, objects, copy, multipart, acl      the operations, on the ports of ``objects.api``
    headers, xml, tags, digest                           parsing, strictly, into the values of those ports
    body, send                                           streams in and out, with back-pressure, time-outs and bounds
    (limits)
"""
