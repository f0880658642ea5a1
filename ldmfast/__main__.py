from ldmfast.commands.cli import entry

entry()
