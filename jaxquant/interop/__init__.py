"""Other frameworks: one module for each, which imports it only when you import that module."""
