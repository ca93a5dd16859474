"""Export: other forms of a trained model, each compared with the checkpoint. Needs torch."""
