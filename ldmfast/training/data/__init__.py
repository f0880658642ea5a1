"""Where collections were; users import them from here."""

from ldmfast.data.collection import Pictures, load_pictures, read_picture, read_rows, write_rows

__all__ = ["Pictures", "load_pictures", "read_picture", "read_rows", "write_rows"]
