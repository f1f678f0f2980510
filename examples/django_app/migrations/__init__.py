"""Migrations of the gallery."""
