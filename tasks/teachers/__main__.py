"""Train a teacher from the command line: `python -m tasks.teachers NAME --minutes N`."""

from tasks.teachers import main

main()
