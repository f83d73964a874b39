"""Every operation that changes objects, from the request's body to the committed record."""
