"""Runs: one configuration carried out from start to report."""
