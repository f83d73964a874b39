"""IAM and STS, as far as clients of S3 use them: the query API on the S3 port, and the same actions for the admin API.

query       the HTTP form of a call, and of its answer
actions     the table of all actions: who may, on what, and the function that performs it
users, groups, roles, policies, keys, sts   these functions
call        what they work on
"""
