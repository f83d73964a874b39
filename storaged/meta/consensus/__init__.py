"""The consensus on one register (CASPaxos), pure. Imports neither storage nor transport.

The acceptor's answers are tables (``judge_...`` in ``acceptor``). The switches of the rules, ballots and lineages are
in ``register``, a change and a read as state machines in ``proposer`` and ``reader``.
"""
