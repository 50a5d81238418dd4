"""Thin matrices instead of a wide one: decompositions, the ranks that a budget allows, and the methods made of them."""
