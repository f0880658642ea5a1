"""Published checkpoints in both layouts, the released one and diffusers': what a file is, its parts, its names.

    families.py            the published models as data
    infer.py, settings.py  what the shapes say, and what only the family knows
    keys.py, keys_text.py  the names, both ways
    parts.py               a checkpoint taken apart and put together; conditioner_parts.py for what steers it
    diffusers_folder.py, weights.py  diffusers' folders; tensors from files

`ldmfast/pipeline/load.py` and `ldmfast/released/conversion.py` are what people call.
"""
