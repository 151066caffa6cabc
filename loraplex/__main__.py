"""`python -m loraplex`."""

from .cli import main

if __name__ == "__main__":
    main()
