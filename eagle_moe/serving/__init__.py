"""`eagle-moe serve`: chat completions over HTTP, by the machinery of `transformers serve`."""
