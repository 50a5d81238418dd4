"""One file per criterion or scheme: which weights go, as a pure function of a weight and of its inputs' statistics."""
