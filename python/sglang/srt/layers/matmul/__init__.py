"""Matrix products of a model's linear layers, by lane."""
