"""The ops of a GPU's way alone: what stands around its vendors' products, each in one launch. On a CPU `linear` and
`conv2d` take it in themselves."""
