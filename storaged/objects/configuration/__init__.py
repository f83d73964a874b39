"""What a bucket is configured to do: the value (``document``), and each kind of configuration (``kinds``)."""
