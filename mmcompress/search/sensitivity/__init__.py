"""Sensitivity: how far the pipeline's loss rises when one block is cut or one node is rounded.

- `curves`: one block's curve, and the table of all curves and roundings. No torch.
- `measure`: curves by running the cut pipeline.
- `estimate`: curves from importance scores; nothing is run.
- `gather`: everything the search needs, measured once a run.
- `store`: the record `Sensitivity`, its files, and how they are read.
"""
