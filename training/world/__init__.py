"""A world to draw: scenes, their captions in English and Chinese, and their pictures, all made from a seed.

>>> from zimgkit.training.world.captions import caption
>>> from zimgkit.training.world.drawing import draw
>>> from zimgkit.training.world.sampling import sample
>>> scene = sample(7, split="test")
>>> picture, prompt = draw(scene), caption(scene)

``python -m zimgkit.training.world FOLDER --count 1000`` writes a dataset.
"""
