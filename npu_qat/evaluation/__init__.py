"""How well a model does: accuracy on held-out problems, and what an interval lets one conclude."""
