"""Train a teacher from the command line: `python -m tasks.teachers NAME`."""

from tasks.teachers import main

main()
