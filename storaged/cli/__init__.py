"""Commands of `storaged`: a client of the admin API; `run` and `dev` import the node lazily.

Commands import most modules inside functions, so that each command, and ``--help``, loads only what it uses.
"""
