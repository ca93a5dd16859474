"""Transfer learning: pretrained weights, the probe, kept activations, and the choice among candidates."""
