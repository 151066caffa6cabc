"""The router: owns every decision. Imports no torch, NumPy, CuPy or transformers."""
