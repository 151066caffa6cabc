"""`loraplex adapters …`: look at adapters, try them on a base, convert and merge them, manage a server's."""
