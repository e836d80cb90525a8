"""`python -m qemcli` is `qem`."""

from qemcli.cli import main

main()
