"""`python -m cftrain`: what torchrun starts."""

from cftrain.cli import main

main(prog_name="cftrain")
