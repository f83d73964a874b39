"""One suite for each port: what every body of it does, the product's own and the doubles alike."""
