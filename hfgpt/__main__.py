"""`python -m hfgpt`, for launchers that take a module."""

from hfgpt.cli import main

main()
