"""What this machine does with this model: measured on the engine's lanes, kept, and reported."""
