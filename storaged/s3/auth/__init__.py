"""Authentication: Signature Version 4, signed chunks, and the policies of browser forms."""
