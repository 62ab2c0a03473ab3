"""`python -m placement`: the planner without the runtime."""

from placement.cli import main

if __name__ == "__main__":
    main()
