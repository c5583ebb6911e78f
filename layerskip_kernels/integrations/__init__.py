"""Other people's interfaces on these kernels: Transformers. Each module imports its library only when used."""
