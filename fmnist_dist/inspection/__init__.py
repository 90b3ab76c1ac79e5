"""Reading runs without taking them over: what the commands `runs` and `evaluate` share."""
