"""`python -m jaxquant` is the `jaxquant` command."""

from jaxquant.cli import main

main()
