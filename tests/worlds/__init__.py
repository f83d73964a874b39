"""Arrangements that several tests share: one plane of the product on doubles, with what the tests do to it."""
