"""LoRA operators behind one protocol (`ops.LoraOps`), one backend for each kind of device.

Nothing is imported here: with a checkout on the path, other libraries that look for a package named
`kernels` may find this folder, and must be able to import it at no cost.
"""
