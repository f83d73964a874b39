"""Who asks: Signature Version 4, and the policies of browser forms."""
