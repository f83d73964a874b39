"""One disk as an acceptor: the shell that gives the rules a store, memory for promises, and time to sync."""
