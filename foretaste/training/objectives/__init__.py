"""Training objectives: each turns a model and a batch into a scalar loss."""
