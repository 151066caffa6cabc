"""What goes wrong with benchmarks."""


class BenchFailed(Exception):
    """Something could not be installed, started or measured. The message is one line for the user."""
