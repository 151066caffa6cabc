"""The bundled model and adapters, and the command that shows them working."""
