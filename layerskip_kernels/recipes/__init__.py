"""What the shipped checkpoints were made with: the parse task, the code corpus, training configs, cards."""
