"""Example apps to copy, and a demo that loses its files and restores them."""
