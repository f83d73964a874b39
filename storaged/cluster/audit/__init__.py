"""The audit log: entries, checkpoints, witnesses, verification."""
