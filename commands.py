"""The command line: `python commands.py VERB [key=value | --key value ...]`.

image_classifier/cli/main.py has the table of verbs. What follows the verb goes to a real @hydra.main function: Hydra's
shell completion looks for that word in this file.
"""

from image_classifier.cli.main import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()
