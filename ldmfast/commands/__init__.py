"""One file for each family of commands: `add(commands)` describes it to argparse, the rest runs it.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""
