"""The fragment plane: sealed, coded bytes on disks. Everything here is opaque to the storage node that keeps it."""
