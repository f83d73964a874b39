"""Bounded memory of the object plane: values, opened records, rows of listings, buffers."""
