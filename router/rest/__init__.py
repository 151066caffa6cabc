"""The REST facade: one module a dialect."""
