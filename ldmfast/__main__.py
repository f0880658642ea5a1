import sys

from ldmfast.commands.cli import main

sys.exit(main())
