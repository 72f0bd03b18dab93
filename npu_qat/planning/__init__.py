"""Whether a run fits and how long its steps take, before anything is started."""
