"""Images to answers: one predictor, and a short file for each backend behind it."""
