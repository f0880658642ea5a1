"""Picture collections: how a folder is read, and the makers of the collections that the shipped models learned."""
