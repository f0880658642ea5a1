"""What `ldmfast sample` does around the pipeline; nothing here imports torch.

bounds.py       numbers, sizes and memory, checked before anything heavy is imported
described.py    what a model's folder says of itself
fitting.py      pictures and masks brought to the model's size
wording.py      prompts as people type them; what can be drawn, and the words that a model does not know
palette.py      the colours of semantic maps
examples.py     inputs to try
terminal.py     the picture on a terminal that can show one
film.py         the steps of a picture in a row
"""
