"""Published checkpoints in both layouts, the released one and diffusers': what a file is, its parts, its names.

families.py            the published models as data
infer.py, settings.py  what the shapes say, and what only the configuration or the family knows
noise_schedule.py      what a model predicts, and its betas: in which order a file is believed
keys.py, keys_text.py  the names, both ways; spellings.py: as tools left them
model.py               a model as parts; conditioner_parts.py for the LDM paper's encoders
single_file.py, diffusers_folder.py   a model from either layout; parts.py: the tensors into it, and back
weights.py             tensors from files; inert_pickle.py, torch_files.py: those of torch.save, with nothing run
read.py, conversion.py                either layout read; one into the other
"""
