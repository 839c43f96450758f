"""Tasks of lmms-eval, changed back to what they were when the paper's scores were made."""
