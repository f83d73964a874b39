"""Reading objects: from the record to verified plaintext."""
