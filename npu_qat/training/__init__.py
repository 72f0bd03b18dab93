"""How the model learns: one DeepSpeed engine, two methods, checkpoints that survive a kill."""
