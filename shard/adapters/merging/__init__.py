"""New adapters made of others, as PEFT merges them."""
