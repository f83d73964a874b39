"""The metadata ring: one CASPaxos register per key, over the partition's replicas, listed in key order."""
