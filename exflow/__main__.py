"""`python -m exflow`, as torchrun starts it."""

from exflow.cli import main

if __name__ == "__main__":
    main()
