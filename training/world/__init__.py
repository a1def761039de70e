"""A world to draw: scenes, their captions in English and Chinese, and their pictures, all made from a seed.

>>> from zimg.training.world.captions import caption
>>> from zimg.training.world.drawing import draw
>>> from zimg.training.world.sampling import sample
>>> scene = sample(7, split="test")
>>> picture, prompt = draw(scene), caption(scene)

``python -m zimg.training.world FOLDER --count 1000`` writes a dataset.
"""
