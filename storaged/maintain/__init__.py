"""Background work: repair, scrub, collection. Works on sealed bytes, without keys."""
