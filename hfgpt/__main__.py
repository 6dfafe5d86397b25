"""`python -m hfgpt`, for launchers that run modules."""

from hfgpt.cli import main

main()
