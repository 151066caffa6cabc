"""What is tested on the CPU by emulation, and the whole server, on a GPU."""
