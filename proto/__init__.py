"""The contracts between processes, and how they are connected. The modules `*_pb2*` are generated: see
`make proto`."""
