"""One file per method: a pure function of a weight, of what is known about its inputs, and of a QuantFormat."""
