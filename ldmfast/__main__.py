import sys

from ldmfast.cli import main

sys.exit(main())
