"""The codes and places of data: geometry, erasure coding, sealing, manifests. Mostly pure."""
