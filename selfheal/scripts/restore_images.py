"""Bring back what is missing on disk; run it in deploys: `selfheal restore`."""

from . import main

if __name__ == "__main__":
    main("restore")
