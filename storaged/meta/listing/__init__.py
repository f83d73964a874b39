"""Listings of a bucket: settled rows of 16 shards, merged in key order."""
