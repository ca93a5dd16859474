"""What happens around the steps of a training, one file a subject; each class is named by conf/callbacks or built by run.py."""
