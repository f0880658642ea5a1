"""Checkpoints and exported folders that are complete or absent, whatever moment the process is killed at."""

import torch

from ldmfast import files


def save(state, path):
    """Write `state` (tensors and plain values) to `path`, which holds the old or the new one at every moment.

    Raises OSError naming `path` where it cannot be written; nothing is left beside it then.
    """
    files.remove_leftovers(path, alone=True)  # a run that was killed in a save left as much as a checkpoint takes
    with files.replacing(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def load(path):
    """Read what `save` wrote. Raises ValueError for a file that is cut short or is no checkpoint, OSError for none."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # what unpickling comes upon; a file that is cut short can say "Invalid argument" alone
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = files.first_line(error, 120)
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}); remove it to begin again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(found).__name__}; remove it to begin again")
    return found


def replace_folder(folder, write):
    """Call write(partial) on an empty folder, which then takes the place of `folder`."""
    files.remove_leftovers(folder, alone=True)
    with files.replacing_folder(folder) as partial:
        write(partial)
