"""The first address of ldmfast.conditioning, kept for programs that import from here."""

from ldmfast.conditioning import *  # noqa: F403
