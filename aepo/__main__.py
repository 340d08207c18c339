"""`python -m aepo` is the command `aepo`."""

from aepo.cli import main

main()
