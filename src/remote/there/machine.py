"""What the server is."""
