"""Transfer learning: which pretrained network to start from, the probe, kept activations, the choice among candidates."""
