"""The consensus on one register (CASPaxos): rules as pure tables. Imports neither storage nor transport."""
