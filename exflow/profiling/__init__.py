"""Recording which experts a model's tokens use: hooks, batches, resumable parts."""
