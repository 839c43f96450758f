"""A package, so that no library that brings a `tests` of its own is imported in its place."""
