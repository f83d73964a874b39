"""Erasure coding, placement and sealing of objects, and their records: values in, values out."""
