"""LoRAs: from a file in any of the formats in use to changes of the checkpoint's tensors, merged while those stream.

``source`` finds the file, ``formats`` reads its keys, ``names`` finds the tensors they mean, ``deltas`` is the algebra,
``merge`` puts several LoRAs together, ``swap`` exchanges those of a built bundle. Nothing here needs PyTorch.
"""
