"""Dispatchers: one file a policy. `adaptive` is the method; the others are honest baselines."""
