"""What the servers serve; one module per contestant, each with `make()`, so that none imports another's packages."""
