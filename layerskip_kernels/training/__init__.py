"""Training for early exit: layer dropout, the early-exit loss, and a trainer that applies both."""
