"""How the mini models get their eyes and their language, from nothing, in minutes.

Full-size models start from published weights instead and never come here.
"""
