"""Tasks of lmms-eval: ours, in YAML files beside this one, and those that it brings."""
