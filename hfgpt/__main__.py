"""`python -m hfgpt`, for launchers that run modules."""

from hfgpt.cli import main

if __name__ == "__main__":  # a process that this one starts imports it under another name
    main()
