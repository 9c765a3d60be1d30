"""Meet other frameworks where they are: one module each, which imports nothing but its own framework and jaxquant."""
