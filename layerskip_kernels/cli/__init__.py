"""The ``layerskip`` command: a file for each group of commands, their options, and what they show."""
