"""What goes wrong with peers."""


class PeerFailed(Exception):
    """A peer could not be installed, started or measured. The message is one line for the user."""
