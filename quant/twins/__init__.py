"""Twins: small networks with the inputs, outputs and operators of official models, trained on generated data.

They stand in where the official weights cannot be had: their metric means something on a small generated world of
their own, and they take every step of the way that the official model takes. Each module has
`train(folder, seed, minutes)`, which writes an inference folder in the official layout, and
`write_world(folder, count, seed)`, which writes labelled pictures of the twin's world.
"""
