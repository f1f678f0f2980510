"""Make the tables, and bring the files on disk into the database: `selfheal migrate`."""

from . import main

if __name__ == "__main__":
    main("migrate")
