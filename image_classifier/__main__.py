"""The command line as `python -m image_classifier`."""

from image_classifier.cli.main import run

if __name__ == "__main__":
    run()
