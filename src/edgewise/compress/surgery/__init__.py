"""What of a decoder must be cut together, and cutting, merging, folding and inheriting it."""
