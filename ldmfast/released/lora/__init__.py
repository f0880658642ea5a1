"""LoRA files as people have them: kohya's, LyCORIS', diffusers' old and new, peft's.

lora_names.py      whose layer a key changes, and which of a change's tensors it is
lora_matrices.py   the tensors of one layer's change as a low-rank pair
lora_file.py       a file as changes, by network and layer
"""
