"""The contracts between processes. The modules beside this file are generated: see `make proto`."""
