"""`python -m pipermoe` is the command `pipermoe`."""

from pipermoe.cli import main

main()
