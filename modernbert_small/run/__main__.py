"""python -m modernbert_small.run: the command that pipeline.py describes, under the name that one looks for."""

from modernbert_small.pipeline import main
from modernbert_small.run.script import run_script

if __name__ == "__main__":
    run_script(main)
