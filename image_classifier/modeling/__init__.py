"""Networks: backbones, and the classifier that wraps one with normalisation and a head. Torch, no Lightning."""
