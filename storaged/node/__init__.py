"""The composition root: builds the planes of one node by its roles, and runs them."""
