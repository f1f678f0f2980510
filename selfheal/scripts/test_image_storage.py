"""Is everything backed up, and can it be brought back? `selfheal verify`."""

from . import main

if __name__ == "__main__":
    main("verify")
