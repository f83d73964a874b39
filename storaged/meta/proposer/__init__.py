"""Changes and reads of registers, as a gateway or a maintenance task proposes them."""
