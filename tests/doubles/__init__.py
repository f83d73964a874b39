"""The in-memory bodies of the product's ports. Each passes the suite of its port (``tests/suites``)."""
