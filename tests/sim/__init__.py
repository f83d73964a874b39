"""The ring's real code on a virtual clock, a virtual network and disks that lose what was not synced: seeded,
replayable, judged.

``python -m tests.sim --seeds 1000`` runs it; ``--break RULE`` turns one of the register's rules off and says how many
seeds it took to notice.
"""
