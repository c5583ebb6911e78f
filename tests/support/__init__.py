"""What several test files use: tiny models, checkpoints, tokenizers, arguments of ops, random walks."""
