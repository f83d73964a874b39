"""The S3 port of a gateway: HTTP requests in, answers out.

The way of a request, and the module of each step:

    app          listens, accepts connections, closes in order
    http         the connection: grammar of a head (pure), body, limits; no S3
    responder    the order of the steps that follow, with a task or without one
    request      the target, taken apart: bucket, key, parameters
    routes       the table of all operations: which one does the request ask for?
    auth         the signature: sigv4 (pure), aws_chunked (pure), form_policy (pure)
    admission    locate, authenticate, the bucket's record, its owner, the headers that the operation accepts
    operation    a row of ``routes``, and its checks; aws_names lists the headers and parameters that AWS documents
    ops          the handlers: put, get, delete, copy, attributes, multipart, post (forms), listing, buckets, acl
    reply, send  the answer as a value; writing it to the connection

A new operation is a handler in ``ops`` and a row in ``routes``. Its new headers and parameters go into ``aws_names``;
they are parsed in ``headers`` or ``conditions``. Its documents are read by ``documents`` and parsed by ``xml``. What it
does to objects and buckets is a call of the ports in ``objects.api``, which ``context.Front`` holds. ``bucket_retry``
runs a handler again when its bucket was replaced meanwhile.

An operation on the path of every small request can also have an ``operation.Attempt``: the same steps without a task.
"""
