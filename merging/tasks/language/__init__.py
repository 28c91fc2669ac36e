"""Tasks on prompts and completions, for causal models and encoder–decoders."""
