"""Commands of `storaged`: a client of the admin API; `run` and `dev` import the node lazily."""
