"""Time, memory, energy and quality of any callable; what the machine can do; statistics of interleaved runs."""
