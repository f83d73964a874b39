"""Inventories: lists of a bucket's objects, made each day or week and put into a bucket, as on AWS.

Theory of operation. A worker (``s3.inventories``) visits the buckets that have inventories, in turn. When a report is
due it walks over the bucket in pages, and makes one data file after the other (``files``), each of bounded size, so
that it holds no more than one file and one page in memory. A file is put into the target; then a row says that it is
made, and where the next one begins (``objects.inventory.rows``). So a worker that dies loses at most the file that it
was making, and the next one goes on after the last row. When the walk has ended, the manifests are put (``manifest``),
the checksum last: AWS's documentation says that a client may wait for it.

The worker writes as the service «s3.amazonaws.com», and only what the policy of the target allows to that service, as
on AWS. A target that refuses, or that is not there, is a problem that ``status`` names; nothing is walked for it.

A report is no snapshot: what changes while it is made may be in it or not, as on AWS.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory.html
"""
