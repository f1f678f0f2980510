"""`python -m selfheal` is the command `selfheal`."""

from .scripts import main

main()
