"""The nouns of edgewise: small immutable types that every room speaks in. NumPy only."""
