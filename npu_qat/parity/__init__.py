"""Does the serving side compute what was trained? Measured at four levels, from codes to tokens."""
