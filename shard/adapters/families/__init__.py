"""How each family of adapters is read: its config and tensors in, changes to the base out."""
