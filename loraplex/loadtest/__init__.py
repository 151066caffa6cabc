"""`loraplex bench`: one seeded load against any OpenAI-compatible server, or against several in turns."""
