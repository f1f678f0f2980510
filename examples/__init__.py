"""Small apps to copy from, and a demo that loses its disk."""
