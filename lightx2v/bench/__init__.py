"""How fast this machine runs the engine's networks, with random weights: no checkpoint is needed.

`command.py` is `lightx2v bench`. A *subject* is a network at one size of video, a *contestant* one way to run it, and a
*race* times contestants in turns on the very same weights and inputs: a GPU at its power limit changes its clock from
second to second, so what is to be compared must be interleaved. What a contestant computed is compared before it is
timed.
"""
