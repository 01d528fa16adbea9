"""Ways of learning: from a model and a batch to a scalar, one small function each."""
