"""Python face of the compiled core: one function per kernel, each with its NumPy reference in the tests."""
