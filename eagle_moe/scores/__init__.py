"""Scores as they are kept, so that whoever has a released model can recount what it says of itself.

`eval` measures and writes them. Nothing here needs torch or a model.
"""
