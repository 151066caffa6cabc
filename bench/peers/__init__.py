"""Other servers beside ours: installed in environments of their own, same model, same load, in turns."""
