"""From a source to weights: what a model is, where it is read from, and its tensors in a backend's layout."""
