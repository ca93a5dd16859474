"""Networks: backbones, and the classifier that adds normalisation and a head. It needs torch, not Lightning."""
