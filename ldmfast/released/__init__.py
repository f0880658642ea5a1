"""Published checkpoints in both layouts, the released one and diffusers': what a file is, its parts, its names.

families.py            the published models as data
infer.py, settings.py  what the shapes say, and what only the family knows
keys.py, keys_text.py  the names, both ways
model.py               a model as parts; conditioner_parts.py for the LDM paper's encoders
single_file.py, diffusers_folder.py   a model from and to either layout; weights.py: tensors from files
read.py, conversion.py                either layout read; one into the other
"""
