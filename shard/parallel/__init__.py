"""One copy of a model held by several processes: who they are, what each holds, and how they read it."""
